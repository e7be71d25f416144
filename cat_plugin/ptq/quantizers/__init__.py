"""Quantizers of one tensor, and the search for their ranges."""
