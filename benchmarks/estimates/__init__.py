"""How right the estimates are: `python -m benchmarks.estimates`."""
