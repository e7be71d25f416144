"""Compiled libraries kept by what they were compiled from: the same graph for the same target is compiled once.

The cache lies in ``$CAT_CACHE_DIR``, else ``$XDG_CACHE_HOME/cat-ptq``, else ``~/.cache/cat-ptq``.  An entry is named by the
sha256 of the graph with its constants, the target, the options, the releases of TVM and the sources of this package, so
that nothing out of date is ever found.  What is found is checked against its own sha256 before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cat_plugin.files import sha256_of, staged_directory

__all__ = [
    "KEPT",
    "compared",
    "directory",
    "fetch",
    "key",
    "note_compared",
    "prune",
    "sources",
    "store",
    "whole",
]

_FILE = re.compile(r"\d+\.so|checks\.safetensors")

KEPT = 24
"""How many libraries are kept; the least recently used go first."""

_COMPARED = 1000
"""How many structures are remembered; empty files."""

_log = logging.getLogger("cat_plugin")


def directory() -> Path:
    """Where the cache lies."""
    if chosen := os.environ.get("CAT_CACHE_DIR"):
        return Path(chosen) / "tvm"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cat-ptq" / "tvm"


def sources() -> Iterable[Path]:
    """The files of this package, on which the result depends."""
    return sorted(Path(__file__).parent.rglob("*.py"))


def key(mod: Any, *options: Any) -> str:
    """The name of what `mod` compiles to with `options`."""
    import tvm  # here, so that what is kept is found without it

    from tvm_backend import compat

    digest = hashlib.sha256()
    for text in (mod.script(show_meta=False), repr(options), tvm.__version__, compat.ffi_version()):
        digest.update(text.encode())
        digest.update(b"\0")
    for path in sources():
        digest.update(path.read_bytes())
    for array in compat.constants(mod):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def compared(structure: str, *options: Any) -> Path:
    """Where it is noted that a library of that structure was compared with its program level by level, and was right."""
    digest = hashlib.sha256("\0".join((structure, repr(options))).encode())
    for path in sources():
        digest.update(path.read_bytes())
    return directory().with_name("compared") / digest.hexdigest()


def note_compared(path: Path) -> None:
    """Write such a note.  Where it cannot be written, the next model is compared again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        prune(path.parent.iterdir(), _COMPARED)
    except OSError as error:
        _log.debug("what was compared cannot be noted in %s: %s", path.parent, error)


def prune(entries: Iterable[Path], kept: int) -> None:
    """Remove all but the last changed of some files or directories."""
    for old in sorted(entries, key=lambda path: path.stat().st_mtime)[:-kept]:
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that a description names."""
    rows = manifest.get("checks")
    return [*manifest["variants"], *([] if rows is None else [rows])]


def whole(entry: Path) -> dict[str, Any] | None:
    """The manifest of an entry whose files are as they were when they were kept; else None."""
    try:
        manifest = json.loads((entry / "library.json").read_text(encoding="utf-8"))
        for variant in _files(manifest):
            # The names that the compiler gives: an entry cannot point elsewhere.
            if (
                not _FILE.fullmatch(variant["file"])
                or sha256_of(entry / variant["file"]) != variant["sha256"]
            ):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(manifest)


def fetch(name: str, into: Path) -> dict[str, Any] | None:
    """Copy an entry's files into a directory; its manifest, or None when there is no sound entry."""
    entry = directory() / name
    manifest = whole(entry)
    if manifest is None:
        return None
    try:
        os.utime(entry)
        for variant in _files(manifest):
            shutil.copyfile(entry / variant["file"], into / variant["file"])
    except OSError as error:
        _log.debug("the cache entry %s cannot be used: %s", entry, error)
        return None
    _log.info("taken from the cache: %s", entry)
    return manifest


def store(name: str, files: Path, manifest: dict[str, Any]) -> None:
    """Keep a copy of the libraries in `files`.  A cache that cannot be written is no reason to fail."""
    root = directory()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with staged_directory(root / name) as staged:
            for variant in _files(manifest):
                shutil.copyfile(files / variant["file"], staged / variant["file"])
            (staged / "library.json").write_text(json.dumps(manifest), encoding="utf-8")
        prune((path for path in root.iterdir() if not path.name.startswith(".")), KEPT)
    except OSError as error:
        _log.warning("the compiled library cannot be kept in %s: %s", root, error)
