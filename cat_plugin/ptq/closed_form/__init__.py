"""Layers fitted without gradients: moments, ranges, error-compensated rounding, bias correction."""
