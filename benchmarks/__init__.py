"""Measured comparisons on the machine at hand: `python -m benchmarks.run`, then `python -m benchmarks.report`."""
