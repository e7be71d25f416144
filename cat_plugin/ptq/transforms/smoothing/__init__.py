"""Scales and shifts of channels that move what is hard to quantize from activations into weights (SmoothQuant, LRQuant+)."""
