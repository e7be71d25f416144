"""The fused cluster-affine step: what it computes, its reference and its kernels."""
