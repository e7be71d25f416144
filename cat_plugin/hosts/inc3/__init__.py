"""Neural Compressor 3.x."""
