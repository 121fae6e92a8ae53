"""Benchmarks: `make bench` runs every module here; each prints a table and writes benchmarks/results/<name>.json."""
