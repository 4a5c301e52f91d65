"""Leaving out whole layers of a model: which ones, and what is left of it."""
