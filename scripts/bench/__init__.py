"""Benchmarks: each compares side by side in one run and prints a table and, last, one line of JSON."""
