"""Attention over all keys, and over the pool."""
