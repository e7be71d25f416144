"""Integer kernels for CPUs, one file a kernel."""
