"""Integer kernels: specifications, and generators of their code for processors and CUDA devices."""
