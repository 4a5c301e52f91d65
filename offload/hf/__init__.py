"""What transformers sees: attaching, caches and layers, forwards."""
