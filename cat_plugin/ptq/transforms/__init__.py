"""Exact rewrites of the full-precision graph before quantizers go in."""
