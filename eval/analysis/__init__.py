"""Where a model's attention is predictable, and why: by layer and head."""
