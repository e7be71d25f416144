"""The stages of a quantization, a file for each; their order is in :mod:`cat_plugin.ptq.pipeline`."""
