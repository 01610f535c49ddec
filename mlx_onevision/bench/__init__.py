"""Benchmarks of this package and of others, and what `doctor` tests."""
