"""Benchmarks: each prints ratios measured side by side in one run, beside the physical limit where there is one."""
