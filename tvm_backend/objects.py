"""Functions compiled one by one, by several threads, to objects that are kept: the same function is compiled once.

A library links the objects of the functions that it calls.  They are kept beside the libraries of
:mod:`tvm_backend.cache`, named by the sha256 of what the function depends on, the target, the releases of TVM and the sources of
this package; each begins with the sha256 of the rest, by which it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tvm
from tvm.tirx import PrimFunc

from cat_plugin.files import locked, write_bytes
from tvm_backend import cache as cache_of
from tvm_backend import compat
from tvm_backend.lowering import pipeline_for

__all__ = ["KEPT", "Source", "objects", "symbol_of"]

KEPT = 4000
"""How many objects are kept; the least recently used go first."""

_MOST_THREADS = 16
_DIGEST = 32
_log = logging.getLogger("cat_plugin")


@dataclass(frozen=True)
class Source:
    """A function that may not be written yet.

    Parameters
    ----------
    form : str
        What it depends on besides its name: equal forms make equal functions.
    build : callable
        Writes it, under the name that is given.
    plain : PrimFunc, optional
        The same computation in loops as they come, compiled where TVM fails on what is written.
    """

    form: str
    build: Callable[[str], PrimFunc]
    plain: PrimFunc | None = None


def symbol_of(name: str, form: object) -> str:
    """A function's name in libraries: what it computes, and which of those that compute it."""
    return f"{name}_{hashlib.sha256(repr(form).encode()).hexdigest()[:8]}"


@cache
def _versions() -> bytes:
    """What every object depends on."""
    digest = hashlib.sha256(f"{tvm.__version__} {compat.ffi_version()}".encode())
    for path in cache_of.sources():
        digest.update(path.read_bytes())
    return digest.digest()


def _kept(symbol: str, source: Source, target: Any) -> Path:
    digest = hashlib.sha256(_versions())
    for text in (symbol, source.form, str(target)):
        digest.update(f"{len(text)} {text}".encode())
    return cache_of.directory().with_name("kernels") / f"{digest.hexdigest()}.o"


def _read(path: Path) -> bytes | None:
    """A sound object that is kept; else None."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _prune(directory: Path) -> None:
    with locked(directory):
        cache_of.prune(directory.glob("*.o"), KEPT)


def _build(symbol: str, function: PrimFunc, target: Any, path: Path) -> None:
    module = tvm.IRModule({symbol: function.with_attr("global_symbol", symbol)})
    built = tvm.tirx.build(module, target=target, pipeline=pipeline_for(function))
    built.write_to_file(str(path))


def objects(
    functions: Mapping[str, Source], target: Any, directory: Path, keep: bool = True
) -> Iterator[Path]:
    """Compile functions, or take what earlier compilations made of the same.

    Parameters
    ----------
    functions : mapping
        By their symbols.
    target : tvm.target.Target
        A processor.
    directory : pathlib.Path
        Takes the objects.
    keep : bool, optional
        Whether to take objects from the cache and to keep those that are made.

    Yields
    ------
    pathlib.Path
        An object for each function, in order, as soon as it is there.
    """
    made = []

    def compiled(symbol: str, source: Source, path: Path) -> Path:
        kept = _kept(symbol, source, target) if keep else None
        code = None if kept is None else _read(kept)
        if code is not None:
            path.write_bytes(code)
            return path
        try:
            _build(symbol, source.build(symbol), target, path)
        except Exception as error:
            if source.plain is None:
                raise
            _log.debug("%s is compiled without its schedule: %s", symbol, str(error).splitlines()[-1:])
            _build(symbol, source.plain, target, path)
        if kept is not None:
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                code = path.read_bytes()
                write_bytes(kept, hashlib.sha256(code).digest() + code)
                made.append(kept)
            except OSError as error:
                _log.debug("a compiled kernel cannot be kept in %s: %s", kept.parent, error)
        return path

    # TVM and LLVM work outside of Python's lock; what is left to Python, writing the loops, is the smaller part.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(compiled, symbol, source, directory / f"kernel{i}.o")
            for i, (symbol, source) in enumerate(functions.items())
        ]
        try:
            for job in jobs:
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()
    if made:
        try:
            _prune(made[0].parent)
        except OSError as error:
            _log.debug("compiled kernels cannot be cleared away: %s", error)
