"""Runs what was just compiled, wherever this machine can, and compares it with the program that it was compiled from.

Outputs that agree but for rounding are right.  Others may be so where a value lies on the edge between two levels; then each
level is compared with what the library computed before it (:mod:`tvm_backend.lockstep`).  Where that cannot be done, outputs may
lie as far apart as rounding was measured to move them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.errors import CompileError, ExportError, LibraryError
from cat_plugin.files import sha256_of
from cat_plugin.graph.checks import Checks, Run, row_distances
from cat_plugin.graph.sampling import Runner, made_up_inputs, make_checks
from tvm_backend.installing import CHECKS
from tvm_backend.runtime import Library, import_tvm
from tvm_backend.variants import obstacle

__all__ = [
    "Checking",
    "Explain",
    "Flat",
    "Verdict",
    "agree",
    "checks_of",
    "expected",
]


@dataclass(frozen=True)
class Verdict:
    """What comparing a library with its program level by level says.

    Attributes
    ----------
    right : bool
        Whether each level follows from those before.
    place : str
        Words on where it goes wrong.
    """

    right: bool
    place: str = ""


Flat = Callable[..., list[np.ndarray[Any, Any]]]
Explain = Callable[[int, Checks, Flat], Verdict | None]
"""Takes the number of a variant, what it should give, and the variant; None where it cannot be compared level by level."""

_ROUNDING = 1e-5
"""Share of the largest output that sums in another order move outputs by, where no value changes its level."""

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


class Checking:
    """Runs the variants of a library that is not installed yet, each as soon as it is there, while the next is made.

    A context manager.  One thread of its own does the work; most of it is done outside of Python's lock.

    Parameters
    ----------
    manifest : dict
        The library's description; its variants may still be to come.
    folder : pathlib.Path
        Where its files lie.
    checks : Checks or None
        What it is run on.
    program : torch.export.ExportedProgram
        What it is compared with.
    dump_dir : path, optional
        Where the caller has the module written after each pass, for the message.
    explain : callable, optional
        Compares a variant with the program level by level.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        folder: Path,
        checks: Checks | None,
        program: Any,
        dump_dir: Any = None,
        explain: Explain | None = None,
    ) -> None:
        self._manifest, self._folder, self._checks = manifest, folder, checks
        self._dump_dir, self._explain = dump_dir, explain
        self._thread = ThreadPoolExecutor(1, "checking")
        self._reasons: list[Future[str]] = []
        self._wanted = None if checks is None else self._thread.submit(expected, checks, manifest, program)

    def __enter__(self) -> Checking:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, number: int) -> None:
        """Check a variant, which is described and written now."""
        self._reasons.append(self._thread.submit(self._one, number))

    def finished(self) -> dict[str, Any]:
        """Put the rows beside the finished files, and return the description that says what was checked.

        Raises
        ------
        CompileError
            A variant computes something else than the program.
        """
        reasons = [each.result() for each in self._reasons]
        manifest, checks, entry = self._manifest, self._checks, None
        variants = [
            {**variant, "checked": reason}
            for variant, reason in zip(manifest["variants"], reasons, strict=True)
        ]
        if checks is not None:
            written = self._folder / CHECKS
            written.write_bytes(checks.to_bytes())
            entry = {"file": CHECKS, "sha256": sha256_of(written), "size": written.stat().st_size}
        independent = checks is not None and checks.rows_are_independent()
        return {**manifest, "variants": variants, "checks": entry, "independent_rows": independent}

    def _one(self, number: int) -> str:
        """Why a variant was not checked; empty where it was."""
        if self._wanted is None:
            return "not checked: the bundle holds no rows, and the program does not run on made-up ones"
        explain = None if self._explain is None else partial(self._explain, number)
        variant = self._manifest["variants"][number]
        return _check(variant, self._manifest, self._folder, self._wanted.result(), self._dump_dir, explain)


def _check(
    variant: dict[str, Any],
    manifest: dict[str, Any],
    folder: Path,
    wanted: Checks,
    dump_dir: Any,
    explain: Callable[[Checks, Flat], Verdict | None] | None = None,
) -> str:
    reason = obstacle(variant)
    if reason is None and variant["device"] == "cuda" and not import_tvm().cuda(0).exist:
        reason = f"{variant['target']} needs a CUDA device"
    if reason is not None:
        return f"not checked: {reason}"
    file = folder / variant["file"]
    try:
        library = Library(file, manifest, variant, str(variant["device"])).flat
        fault = replace(wanted, typical=_ROUNDING, worst=_ROUNDING).fault(library)
    except LibraryError as error:
        if variant["device"] == "cuda":  # the driver, or the runtime, is not one that TVM can use
            return f"not checked: {error}"
        raise CompileError(
            f"the library that was built for {variant['target']} does not run: {error}"
        ) from error
    if fault is None:
        return ""
    verdict = None if explain is None else explain(wanted, library)
    if verdict is None:
        fault = wanted.fault(library)
    if fault is None or (verdict is not None and verdict.right):
        return ""
    modules = (
        f"the module after each pass is in {dump_dir}"
        if dump_dir is not None
        else "compile with dump_dir= to have the module after each pass"
    )
    raise CompileError(
        f"the library that was built for {variant['target']} does not compute what its graph computes: {fault}. "
        f"{'' if verdict is None else verdict.place}Nothing was written. This is a fault of the compiler, not of the model: please report it with the bundle; {modules}"
    )


def agree(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether the first of some outputs are the others but for rounding."""
    pairs = [tuple(map(np.asarray, each)) for each in (found[: len(wanted)], wanted)]
    same = [each.shape for each in pairs[0]] == [each.shape for each in pairs[1]]
    return same and float(row_distances(pairs[:1], pairs[1:]).max()) <= _ROUNDING


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
