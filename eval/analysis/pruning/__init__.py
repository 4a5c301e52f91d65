"""Removes whole layers of a model (TAPPA). Begin with ``plan.py``, which orders layers by importance."""
