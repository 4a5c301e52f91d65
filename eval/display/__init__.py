"""Text tables, heat maps, plots and SVG charts. Knows nothing of benchmarks."""
