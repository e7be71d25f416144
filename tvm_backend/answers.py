"""What earlier compilations of the same bundle gave, found without TVM and PyTorch, whose import alone takes seconds.

A compilation notes under which name the cache keeps what it made.  The note is named by the sha256 of the bundle's graph and rows, the
target, the batch sizes, the processor, the installed releases and the sources of this package.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cat_plugin.errors import CompileError
from cat_plugin.files import staged_files, write_errors, write_text
from tvm_backend import cache
from tvm_backend.installing import install, of_the_user, report_of
from tvm_backend.processor import cpu_features
from tvm_backend.report import CompileReport

__all__ = ["KEPT", "Answer", "find", "note"]

KEPT = 200
"""How many notes are kept; the oldest go first."""

_GRAPH = "model.pt2"
_CHECKS = "checks.safetensors"
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy")
_ENTRY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("cat_plugin")


def _notes() -> Path:
    return cache.directory().with_name("compiled")


def _processor() -> list[str]:
    """What tells processors apart for a compiler: the model, and what it can do."""
    features = cpu_features()
    model: list[str] = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0]
        model = [line for line in text.splitlines() if line.startswith(("model", "cpu family", "CPU "))]
    return [platform.machine(), *model, *sorted(features or ())]


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} none")
    return found


def _name(bundle: Any, target: Any, batch_sizes: Sequence[int]) -> str | None:
    """The name of the note; None where source or target cannot be told apart by what is written down."""
    files = getattr(bundle, "manifest", {}).get("files", {})
    if _GRAPH not in files or not isinstance(target, str | dict):
        return None
    digest = hashlib.sha256()
    try:
        rows = files.get(_CHECKS, {}).get("sha256")
        facts = [files[_GRAPH]["sha256"], rows, target, list(batch_sizes), _processor(), _versions()]
        digest.update(json.dumps(facts, sort_keys=True).encode())
    except (TypeError, ValueError):
        return None
    for path in cache.sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Answer:
    """A library that was compiled before.  Made by :func:`find`.

    Attributes
    ----------
    variants : list of str
        Names of the variants, best first.
    """

    def __init__(self, entry: str, manifest: dict[str, Any], bundle: Any, target: Any) -> None:
        self._entry, self._bundle, self._target = entry, bundle, target
        self.variants = [str(variant["variant"]) for variant in manifest["variants"]]

    def install(self, out: Path) -> CompileReport | None:
        """Write the library; None when it went out of the cache meanwhile."""
        start = time.perf_counter()
        path = out.absolute()
        with write_errors(CompileError, f"a library to {path}"), staged_files(path) as staging:
            manifest = cache.fetch(self._entry, staging)
            if manifest is None:
                return None
            manifest = install(of_the_user(manifest, self._bundle.manifest), staging, path)
        return report_of(manifest, path, self._target, time.perf_counter() - start, cached=True)


def find(bundle: Any, target: Any, batch_sizes: Sequence[int]) -> Answer | None:
    """Look for an earlier compilation.

    Parameters
    ----------
    bundle : Bundle
        Opened, that is with checked hashes.
    target : str or dict
        As for :func:`tvm_backend.compile`.
    batch_sizes : sequence of int
        As for :func:`tvm_backend.compile`.

    Returns
    -------
    Answer or None
    """
    name = _name(bundle, target, batch_sizes)
    if name is None:
        return None
    try:
        entry = (_notes() / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    manifest = cache.whole(cache.directory() / entry) if _ENTRY.fullmatch(entry) else None
    return None if manifest is None else Answer(entry, manifest, bundle, target)


def note(bundle: Any, target: Any, batch_sizes: Sequence[int], entry: str) -> None:
    """Note under which name the cache keeps what was compiled.  Notes that cannot be written are no reason to fail."""
    name = _name(bundle, target, batch_sizes)
    if name is None:
        return
    notes = _notes()
    try:
        notes.mkdir(parents=True, exist_ok=True)
        write_text(notes / name, entry)
        cache.prune((path for path in notes.iterdir() if _ENTRY.fullmatch(path.name)), KEPT)
    except OSError as error:
        _log.debug("what was compiled cannot be noted in %s: %s", notes, error)
