"""From a module of symbolic kernels to a shared library: what the virtual machine runs, and the objects that it calls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import vm_build

from cat_plugin.errors import CATError, CompileError
from tvm_backend import compat, cuda_build, dialect, linker
from tvm_backend.kernels import tir
from tvm_backend.objects import Source, objects
from tvm_backend.passes.dump import Dump
from tvm_backend.passes.lower_kernels import LowerKernels
from tvm_backend.passes.pipeline import library_passes
from tvm_backend.passes.schedule_loops import ScheduleLoops
from tvm_backend.report import KernelEntry
from tvm_backend.target import is_cuda, machine_of

__all__ = ["build_library"]

Told = Callable[[int, int], None]
"""Called with the functions that are compiled, and their number."""


def build_library(
    mod: tvm.IRModule,
    target: Any,
    path: Path,
    dump: Dump | None = None,
    keep: bool = True,
    told: Told | None = None,
) -> list[KernelEntry]:
    """Build a module of symbolic kernels.

    Parameters
    ----------
    mod : tvm.IRModule
        From :func:`~tvm_backend.passes.pipeline.integer_kernels`.
    target : tvm.target.Target
        The target.
    path : pathlib.Path
        The library to write.
    dump : Dump, optional
        Takes the module after each pass.
    keep : bool, optional
        Whether compiled functions are kept, and taken from what was kept.
    told : callable, optional
        Learns how far it is.

    Returns
    -------
    list of KernelEntry
        The kernels of ``main``.

    Raises
    ------
    CompileError
        TVM or the linker failed.
    """
    lower, schedules = LowerKernels(target), ScheduleLoops()
    passes = library_passes(target, lower, schedules, dump)
    size = sum(array.nbytes for array in compat.constants(mod))
    try:
        if is_cuda(target):
            executable = tvm.compile(mod, target=target, relax_pipeline=passes)
            pack = cuda_build.pack_imports(cuda_build.architecture(target))
            linker.export(executable, path, pack, machine_of(target), size)
            return lower.calls("main")
        builder = relax.ExecBuilder()
        with target:
            leftover = vm_build._vmcodegen(builder, passes(mod))  # noqa: SLF001 - tvm.compile would compile the functions as well
        # Corrections come last, and take longest to compile: begun last, they would keep one thread busy and the others waiting.
        functions = dict(
            sorted(lower.sources.items(), key=lambda item: not item[0].startswith(dialect.CORRECTIONS))
        )
        for variable, function in compat.functions(leftover):
            name = str(variable.name_hint)
            if isinstance(function, tirx.PrimFunc) and name not in functions:
                functions[name] = _finished(function, schedules.plain.get(name))
        executable = vm_build._vmlink(builder, target, _anchor())  # noqa: SLF001
        with tempfile.TemporaryDirectory(dir=path.parent) as workspace:
            linker.reserve(Path(workspace), 0)
            compiled = []
            for file in objects(functions, target, Path(workspace), keep):
                compiled.append(str(file))
                if told is not None:
                    told(len(compiled), len(functions))
            linker.export(executable, path, None, machine_of(target), size, compiled)
    except (CATError, OSError):
        raise
    except Exception as error:
        raise CompileError(f"TVM {tvm.__version__} could not build for {target}: {error}") from error
    return lower.calls("main")


def _finished(function: tirx.PrimFunc, plain: tirx.PrimFunc | None) -> Source:
    """A function of operators left in float, which is there already."""
    return Source(tvm.ir.save_json(function), lambda _name: function, plain)


def _anchor() -> tvm.IRModule:
    """A function that does nothing: TVM packs what the virtual machine runs beside some compiled module only."""
    with tir.Function("cat_ptq_library") as function:
        function.buffers([])
        tir.nothing()
    return tvm.IRModule({"cat_ptq_library": function.result})
