"""Benchmarks: one file per claim, against peers, in one run. `python -m benchmarks` lists them."""
