"""Benchmarks: `make bench` runs them and writes the table into the README. They are never part of the tests."""
