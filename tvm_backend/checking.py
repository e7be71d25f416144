"""Runs what was just compiled, wherever this machine can, and compares it with the program that it was compiled from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.errors import CompileError, ExportError, LibraryError
from cat_plugin.files import sha256_of
from cat_plugin.graph.checks import Checks, Run
from cat_plugin.graph.sampling import Runner, made_up_inputs, make_checks
from tvm_backend.installing import CHECKS
from tvm_backend.runtime import Library, import_tvm
from tvm_backend.variants import obstacle

__all__ = ["Locate", "check_variants", "checked_manifest", "checks_of", "expected"]

Locate = Callable[[int, Checks], str]
"""Takes the number of a variant that is wrong and what it should give; returns words on where in the graph, or none."""

_log = logging.getLogger("cat_plugin")


def checks_of(source: Any, program: Any) -> Checks | None:
    """Return the rows that a bundle holds, else rows made up for its program.

    Parameters
    ----------
    source : Bundle or torch.export.ExportedProgram
        What is compiled.
    program : torch.export.ExportedProgram
        The same, opened.

    Returns
    -------
    Checks or None
        None where the program does not run on made-up rows.
    """
    stored: Checks | None = source.checks() if hasattr(source, "checks") else None
    if stored is not None:
        return stored
    try:
        return make_checks(program, made_up_inputs(program))
    except ExportError as error:
        _log.info("no rows to check the library with: %s", error)
        return None


def check_variants(
    manifest: dict[str, Any],
    folder: Path,
    checks: Checks | None,
    program: Any,
    dump_dir: Any = None,
    locate: Locate | None = None,
) -> list[str]:
    """Load and run each variant of a library that is not installed yet.

    Parameters
    ----------
    manifest : dict
        The library's description.
    folder : pathlib.Path
        Where its files lie.
    checks : Checks or None
        What it is run on.
    program : torch.export.ExportedProgram
        What it is compared with.
    dump_dir : path, optional
        Where the caller has the module written after each pass, for the message.
    locate : callable, optional
        Finds where in the graph a variant goes wrong, for the message.

    Returns
    -------
    list of str
        For each variant why it was not checked; empty where it was.

    Raises
    ------
    CompileError
        A variant computes something else than the program.
    """
    if checks is None:
        reason = "not checked: the bundle holds no rows, and the program does not run on made-up ones"
        return [reason] * len(manifest["variants"])
    wanted = expected(checks, manifest, program)
    return [
        _check(variant, manifest, folder, wanted, dump_dir, None if locate is None else partial(locate, i))
        for i, variant in enumerate(manifest["variants"])
    ]


def checked_manifest(
    manifest: dict[str, Any],
    staging: Path,
    checks: Checks | None,
    program: Any,
    dump_dir: Any,
    locate: Locate | None = None,
) -> dict[str, Any]:
    """Run :func:`check_variants`, put the rows beside the finished files, and return the description that says so."""
    reasons = check_variants(manifest, staging, checks, program, dump_dir, locate)
    variants = [
        {**variant, "checked": reason} for variant, reason in zip(manifest["variants"], reasons, strict=True)
    ]
    entry = None
    if checks is not None:
        written = staging / CHECKS
        written.write_bytes(checks.to_bytes())
        entry = {"file": CHECKS, "sha256": sha256_of(written), "size": written.stat().st_size}
    independent = checks is not None and checks.rows_are_independent()
    return {**manifest, "variants": variants, "checks": entry, "independent_rows": independent}


def _check(
    variant: dict[str, Any],
    manifest: dict[str, Any],
    folder: Path,
    wanted: Checks,
    dump_dir: Any,
    locate: Callable[[Checks], str] | None = None,
) -> str:
    reason = obstacle(variant)
    if reason is None and variant["device"] == "cuda" and not import_tvm().cuda(0).exist:
        reason = f"{variant['target']} needs a CUDA device"
    if reason is not None:
        return f"not checked: {reason}"
    file = folder / variant["file"]
    try:
        fault = wanted.fault(Library(file, manifest, variant, str(variant["device"])).flat)
    except LibraryError as error:
        if variant["device"] == "cuda":  # the driver, or the runtime, is not one that TVM can use
            return f"not checked: {error}"
        raise CompileError(
            f"the library that was built for {variant['target']} does not run: {error}"
        ) from error
    if fault is None:
        return ""
    modules = (
        f"the module after each pass is in {dump_dir}"
        if dump_dir is not None
        else "compile with dump_dir= to have the module after each pass"
    )
    raise CompileError(
        f"the library that was built for {variant['target']} does not compute what its graph computes: {fault}. "
        f"{'' if locate is None else locate(wanted)}Nothing was written. This is a fault of the compiler, not of the model: please report it with the bundle; {modules}"
    )


def expected(checks: Checks, manifest: dict[str, Any], program: Any) -> Checks:
    """Return the stored rows, and as many as there is special code for, with what the program makes of them here.

    Parameters
    ----------
    checks : Checks
        The rows.
    manifest : dict
        The library's description: which batch sizes have code of their own, and which inputs have rows.
    program : torch.export.ExportedProgram
        What computes.
    """
    run = Runner(program)
    batches = [each.inputs for each in checks.runs]
    free = [bool(entry["shape"]) and isinstance(entry["shape"][0], str) for entry in manifest["inputs"]]
    known = {len(each) for each in checks.runs}
    for size in manifest["batch_sizes"]:
        if size not in known:
            batches.append(
                tuple(
                    np.resize(each, (size, *each.shape[1:])) if rows else each
                    for each, rows in zip(batches[-1], free, strict=True)
                )
            )
    return Checks(tuple(Run(each, run(*each)) for each in batches), checks.typical, checks.worst)
