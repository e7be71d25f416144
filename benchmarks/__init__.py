"""Benchmarks of this project beside its peers: each prints a table and writes JSON; nothing is asserted."""
