"""Whether a library computes what its model computes, on the rows that lie beside it.  Needs TVM's runtime and numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import LibraryError
from cat_plugin.files import checked
from cat_plugin.graph.checks import Checks

if TYPE_CHECKING:
    from tvm_backend.runtime import Library

__all__ = ["is_entry", "read_checks", "verify"]

_REMEDY = "copy all files of the library again, or compile the model again"


def is_entry(entry: Any) -> bool:
    """Return whether a library's description names a file of checks as it should, or none."""
    return entry is None or (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
        and type(entry.get("size")) is int
        and Path(entry["file"]).name == entry["file"] not in ("", ".", "..")
    )


def read_checks(manifest: dict[str, Any], path: Path) -> Checks:
    """Read the rows that a library is checked by.

    Parameters
    ----------
    manifest : dict
        The library's description.
    path : pathlib.Path
        The library.

    Raises
    ------
    LibraryError
        There are none, or their file is missing or damaged.
    """
    entry = manifest.get("checks")
    if entry is None:
        raise LibraryError(
            f"{path} carries no rows to be checked by; compile the model again, from a bundle that has them, to verify it"
        )
    file = path.with_name(entry["file"])
    with checked(file, entry, LibraryError, _REMEDY) as stream:
        return Checks.read(stream, file, LibraryError, _REMEDY)


def verify(library: Library) -> None:
    """Compare a library's outputs with those that were stored when it was compiled.

    Parameters
    ----------
    library : Library
        Loaded.

    Raises
    ------
    LibraryError
        They differ by more than rounding explains, or there is nothing to compare with.
    """
    fault = read_checks(library.manifest, library.path).fault(library.flat)
    if fault is not None:
        raise LibraryError(
            f"{library.path} does not compute what its model computes on this machine: {fault}. Compile the model here, "
            "with target='native', and report the two processors"
        )
