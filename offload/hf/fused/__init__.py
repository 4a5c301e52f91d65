"""A model's small operations by one kernel each, within captured steps."""
