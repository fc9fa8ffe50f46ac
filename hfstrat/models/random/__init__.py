"""Models with random weights: families, sizes, configs."""
