"""Kernels, and their way into torch."""
