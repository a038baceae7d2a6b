"""Microbenchmarks: ``python -m benchmarks.<name> --help``."""
