"""ATen operators in terms of others, for those who read graphs and know fewer: the ONNX writer and the compiler.

A rewrite is a function with the operator's signature, as in torch's own decomposition tables, that
``ExportedProgram.run_decompositions`` takes; it returns NotImplemented where the operator stays as it is.
"""
