"""From a torch ``ExportedProgram`` to relax.

:mod:`~tvm_backend.importer.program` is the table of contents.  :mod:`~tvm_backend.importer.rewrites` brings the program into
a form that TVM's converters read rightly, :mod:`~tvm_backend.importer.constants` computes what is known already,
:mod:`~tvm_backend.importer.honoured` lists the arguments that each converter reads, and
:mod:`~tvm_backend.importer.converters` holds our own converters.
"""

from tvm_backend.importer.program import Prepared, batch_variable, function_inputs, import_program, prepare

__all__ = ["Prepared", "batch_variable", "function_inputs", "import_program", "prepare"]
