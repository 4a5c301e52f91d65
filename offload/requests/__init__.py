"""Requests of any lengths, side by side."""
