"""The cluster-affine step on CUDA."""
