"""Where blocks are and how they move."""
