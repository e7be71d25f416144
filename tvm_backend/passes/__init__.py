"""The passes from an imported QDQ graph to integer kernels, and :mod:`~tvm_backend.passes.pipeline`, their order."""
