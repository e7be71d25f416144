"""Compile a bundle or an exported program to a library on disk."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from cat_plugin.errors import CATError, CATTypeError, CompileError
from cat_plugin.files import sha256_of, staged_files, write_errors
from cat_plugin.graph.checks import Checks
from cat_plugin.graph.inspect import signature
from tvm_backend import answers, compat, dialect, linker
from tvm_backend import cache as cache_of
from tvm_backend.checking import Checking, Flat, Verdict, agree, checks_of
from tvm_backend.description import FORMAT, VERSION
from tvm_backend.executable import build_library
from tvm_backend.garbage import seldom_collected
from tvm_backend.importer import Prepared, batch_variable, function_inputs, prepare
from tvm_backend.installing import install, of_the_user, report_of
from tvm_backend.kernels.spec import WeightedSpec
from tvm_backend.lengths import of_one_length
from tvm_backend.passes.dump import Dump
from tvm_backend.passes.pipeline import integer_kernels
from tvm_backend.report import CompileReport, KernelEntry
from tvm_backend.runtime import Library
from tvm_backend.target import is_cuda, machine_of, required_features, resolve

__all__ = ["Progress", "compile"]

_log = logging.getLogger("cat_plugin")


Progress = Callable[[int, int, str], None]
"""Called with the steps done, their number and what comes next."""


@seldom_collected()
def compile(
    source: Any,
    target: Any = "native",
    out: str | os.PathLike[str] = "model.so",
    *,
    batch_sizes: Sequence[int] = (),
    tokens: int | None = None,
    cache: bool = True,
    progress: Progress | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
) -> CompileReport:
    """Compile a quantized model to a library that runs without PyTorch.

    Parameters
    ----------
    source : path, Bundle or torch.export.ExportedProgram
        A bundle's directory, an opened bundle, or a QDQ graph.
    target : str, dict or tvm.target.Target, optional
        ``"native"`` for this processor, ``"portable"`` for a library that carries variants for several, the LLVM name of
        a processor, or a TVM target.
    out : path, optional
        The library; a ``.json`` of the same name is written beside it, and further variants as ``name.variant.so``.
    batch_sizes : sequence of int, optional
        Batch sizes to generate code of their own for, beside the code for any batch size.
    tokens : int, optional
        Length of the sequences (N, T) that the library takes, where the graph takes any: that of the example inputs of the
        export unless it is given.
    cache : bool, optional
        Whether to take the result from the cache when the same graph was compiled before, and to keep it there.
    progress : callable, optional
        Called as ``progress(done, total, what)`` before each step.
    dump_dir : path, optional
        A folder that takes the module after each pass as TVMScript; the passes that depend on the target write to a folder
        within it for each variant.  Nothing is taken from the cache then.

    Returns
    -------
    CompileReport
        Kernels, operators left in float, sizes.

    Raises
    ------
    CompileError
        The graph holds no quantization or an operator that cannot be imported, the target is unknown, no linker is
        installed, or the library, run here, computes something else than the graph.

    Examples
    --------
    >>> report = compile("bundle", target="native", out="model.so")  # doctest: +SKIP
    """
    start = time.perf_counter()
    path = Path(out).absolute()
    if path.suffix != ".so":
        raise CompileError(
            f"out={str(out)!r} must end in .so; the description is written to a .json beside it"
        )
    source = _opened(source)
    noted = cache and dump_dir is None and tokens is None
    if noted:
        sizes = tuple(dict.fromkeys(batch_sizes))
        answer = answers.find(source, target, sizes)
        report = None if answer is None else answer.install(path)
        if report is not None:
            return replace(report, seconds=time.perf_counter() - start)
    variants = resolve(target)
    for item in variants.values():
        linker.find(machine_of(item))
    total = len(variants) + 3
    step = progress or (lambda done, total, what: _log.info("%d/%d %s", done, total, what))
    step(0, total, "importing the graph")
    program = of_one_length(_program(source), tokens)
    checks = checks_of(source if tokens is None else program, program)
    prepared, levels = _prepared(program)
    imported = prepared.module(levels or 0)
    batch_sizes = _check_batches(batch_sizes, imported)
    step(1, total, "folding it into integer kernels")
    symbolic = compat.specialize_batch(imported, batch_sizes)
    dump = None if dump_dir is None else Dump(Path(dump_dir))
    symbolic = integer_kernels(symbolic, dump, not any(map(is_cuda, variants.values())))
    _require_quantized(symbolic, program)
    _say_what_is_float(symbolic, program)
    with write_errors(CompileError, f"a library to {path}"), staged_files(path) as staging:
        rows = "" if checks is None else checks.digest()
        name = (
            cache_of.key(symbolic, [str(item) for item in variants.values()], batch_sizes, rows)
            if cache
            else ""
        )
        manifest = cache_of.fetch(name, staging) if cache and dump is None else None
        cached = manifest is not None
        made = manifest or _signatures(imported, _float_operators(symbolic), batch_sizes)
        levelled = None if levels is None else prepared
        explain = partial(_explain, program, levelled, list(variants.values()), batch_sizes, cache)
        with Checking(made, staging, checks, program, dump_dir, explain) as checking:
            for i, (variant, tvm_target) in enumerate(variants.items()):
                if not cached:
                    what = f"generating code for {variant or target}"
                    step(2 + i, total, what)
                    kernels = build_library(
                        symbolic,
                        tvm_target,
                        staging / f"{i}.so",
                        None if dump is None else dump.variant(variant),
                        cache,
                        partial(_told, step, 2 + i, total, what),
                    )
                    if not i:
                        made["kernels"] = [asdict(kernel) for kernel in kernels]
                    made["variants"].append(_describe(variant, tvm_target, staging / f"{i}.so", kernels))
                checking.add(i)
            step(total - 1, total, "comparing the library with the graph")
            manifest = checking.finished()
        if cache:
            if not cached:  # what is found wrong is not kept
                cache_of.store(name, staging, manifest)
            if noted:
                answers.note(source, target, batch_sizes, name)
        described = source.manifest if hasattr(source, "manifest") and tokens is None else signature(program)
        manifest = install(of_the_user(manifest, described), staging, path)
    step(total, total, "done")
    return report_of(manifest, path, target, time.perf_counter() - start, cached)


def _told(step: Progress, done: int, total: int, what: str, compiled: int, functions: int) -> None:
    step(done, total, f"{what}, {compiled} of {functions} functions")


def _opened(source: Any) -> Any:
    """A bundle where its directory is given; anything else as it is."""
    if not isinstance(source, str | os.PathLike):
        return source
    from cat_plugin.graph.bundle import read_bundle

    return read_bundle(source)


def _program(source: Any) -> Any:
    if hasattr(source, "program"):
        return source.program()
    if not hasattr(source, "graph_signature"):
        raise CATTypeError(
            f"cannot compile a {type(source).__name__}; give a bundle's directory, a Bundle or a torch ExportedProgram"
        )
    return source


def _check_batches(batch_sizes: Sequence[int], mod: Any) -> tuple[int, ...]:
    sizes = tuple(dict.fromkeys(int(size) for size in batch_sizes))
    if any(size < 1 for size in sizes):
        raise CompileError(f"batch_sizes={list(batch_sizes)} must be positive")
    if sizes and batch_variable(mod) is None:
        raise CompileError(
            "batch_sizes was given for a graph whose batch size is fixed; export it with a dynamic batch"
        )
    return sizes


def _prepared(program: Any) -> tuple[Prepared, int | None]:
    """A program as TVM reads it, its levels behind its results, and how many these are; None where they cannot be had."""
    from tvm_backend.lockstep import levels_of, with_levels  # imports torch

    try:
        return prepare(with_levels(program)), len(levels_of(program))
    except Exception as error:
        _log.debug("the graph cannot return its levels: %s", error)
        return prepare(program), None


def _explain(
    program: Any,
    prepared: Prepared | None,
    targets: list[Any],
    batch_sizes: tuple[int, ...],
    cache: bool,
    number: int,
    wanted: Checks,
    library: Flat,
) -> Verdict | None:
    """Compare the library for one of `targets` with the program level by level.

    None where that cannot be done, or was done for a model of the same structure.
    """
    from tvm_backend.importer.honoured import where
    from tvm_backend.lockstep import structure_of, unexplained

    if prepared is None:
        return None
    facts = (str(targets[number]), batch_sizes, tvm.__version__)
    known = cache_of.compared(structure_of(program), *facts)
    if cache and known.exists():
        return None
    _log.info("comparing the levels of each quantizer, as outputs differ by more than rounding")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "levels.so"
        try:
            imported = prepared.module()
            symbolic = integer_kernels(
                compat.specialize_batch(imported, batch_sizes), processor=not is_cuda(targets[number])
            )
            kernels = build_library(symbolic, targets[number], built, keep=cache)
            manifest = _signatures(imported, [], batch_sizes)
            variant = _describe("", targets[number], built, kernels)
            levels = Library(built, manifest, variant, variant["device"]).flat
        except CATError as error:
            _log.info("the levels cannot be compared: %s", error)
            return None
        for run in wanted.runs:
            found, outputs = (each(*map(np.array, run.inputs)) for each in (levels, library))
            if not agree(found, outputs):
                _log.info("the levels cannot be compared: kernels that hand none on compute in another order")
                return None
            node = unexplained(program, run.inputs, found)
            if node is not None:
                place = f"The first node whose result differs is {where(node)}, {node.target}. "
                return Verdict(False, place)
    if cache:
        cache_of.note_compared(known)
    return Verdict(True)


def _require_quantized(symbolic: Any, program: Any) -> None:
    """Refuse a graph without quantized weights; with those alone, or on grids of tokens, it computes in float."""
    kernels = (dialect.match_kernel(expr, WeightedSpec) for expr in compat.bound_values(symbolic["main"]))
    weights = any("dequantize_per_channel" in str(node.target) for node in program.graph.nodes)
    if not weights and all(kernel is None for kernel in kernels):
        raise CompileError(
            "the graph holds no convolution or linear layer with quantized weights; quantize the model first "
            "(cat_plugin.ptq.quantize, or Neural Compressor's static quantization)"
        )


def _say_what_is_float(symbolic: Any, program: Any) -> None:
    """Tell of layers with scales for groups, or grids of tokens, that no integer kernel took."""
    kernels = (dialect.match_kernel(expr, WeightedSpec) for expr in compat.bound_values(symbolic["main"]))
    integers = sum(kernel is not None for kernel in kernels)
    targets = [str(node.target) for node in program.graph.nodes]
    if not any(kind in target for target in targets for kind in ("per_channel_group", "per_token")):
        return
    layers = sum("dequantize_per_channel" in target for target in targets) - integers
    if layers > 0:
        _log.warning(
            "%d layers with weights in groups or activations on grids of tokens are computed in float32, and their weights lie in "
            "the library as float32: CUDA devices have no kernels for them, and processors none for weights that something else "
            "reads or changes first",
            layers,
        )


_MOVES = frozenset(
    ["reshape", "permute_dims", "squeeze", "expand_dims", "strided_slice", "concat", "nn.pad", "flatten"]
)


def _float_operators(symbolic: Any) -> list[str]:
    """Operators of ``main`` that compute in float, by name."""
    names = [
        compat.op_name(expr)
        for expr in compat.bound_values(symbolic["main"])
        if str(getattr(compat.type_of(expr), "dtype", "float32")).startswith("float")
    ]
    return [name for name in names if name and name not in _MOVES and name != "call_pure_packed"]


def _describe(name: str, target: Any, built: Path, kernels: list[KernelEntry]) -> dict[str, Any]:
    return {
        "file": built.name,
        "variant": name,
        "target": str(target.attrs.get("mcpu", "") or target.kind),
        "device": "cuda" if is_cuda(target) else "cpu",
        "machine": machine_of(target),
        "features": required_features(target),
        "amx": any(kernel.tile_state for kernel in kernels),
        "sha256": sha256_of(built),
        "size": built.stat().st_size,
    }


def _signature(kind: Any, name: str) -> dict[str, Any]:
    shape: list[int | str] = []
    for size in kind.shape.values:
        # A symbolic size is the batch, or a multiple of it.
        shape.append(int(size) if hasattr(size, "value") else re.sub(r"[A-Za-z_]\w*", "batch", str(size)))
    return {"name": name, "shape": shape, "dtype": str(kind.dtype)}


def _signatures(mod: Any, float_ops: list[str], batch_sizes: Sequence[int]) -> dict[str, Any]:
    """The description of a library, its variants still to come."""
    main = mod["main"]
    result = compat.return_type(main)
    outputs = compat.tuple_fields(result) or [result]
    names = [compat.variable_name(param) for param in main.params]
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": [_signature(kind, name) for kind, name in zip(function_inputs(mod), names, strict=True)],
        "outputs": [_signature(kind, f"output_{i}") for i, kind in enumerate(outputs)],
        "batch_sizes": list(batch_sizes),
        "variants": [],
        "kernels": [],
        "float_ops": float_ops,
        "libraries": {"tvm": tvm.__version__, "tvm_ffi": compat.ffi_version()},
    }
