"""Integer kernels for CUDA: the same specifications and the same arithmetic as on a CPU."""

from __future__ import annotations

from tvm_backend.kernels.cuda.isa import Cuda, Dp4a, TensorCores, capability, select

__all__ = ["Cuda", "Dp4a", "TensorCores", "capability", "select"]
