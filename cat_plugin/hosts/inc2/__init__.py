"""Neural Compressor 2.x."""
