"""Orthogonal matrices between layers: outliers of single channels spread over all of them."""
