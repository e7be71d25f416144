"""The description of a compiled library, the ``.json`` beside it: read with limits and checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cat_plugin.errors import LibraryError
from cat_plugin.files import read_json
from cat_plugin.graph.preparation import are_class_names, is_preparation
from cat_plugin.graph.results import is_structure, result_of
from tvm_backend.verify import is_entry

__all__ = ["FORMAT", "VERSION", "read_manifest"]

FORMAT = "cat-library"
VERSION = 1
_LIMIT = 2 * 2**20
_REMEDY = "copy both files of the library again, or compile the model again"


def read_manifest(path: Path) -> dict[str, Any]:
    """What the ``.json`` beside a library says: inputs, outputs, variants, kernels.  Nothing of the library is loaded.

    Raises
    ------
    LibraryError
        It is missing, damaged or of another format.
    """
    manifest = path.with_suffix(".json")
    parsed = read_json(manifest, _LIMIT, LibraryError, _REMEDY)
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT or parsed.get("version") != VERSION:
        raise LibraryError(
            f"{manifest} does not describe a library of format {FORMAT} {VERSION}; compile the model again"
        )
    for key, right in (("inputs", _is_tensor), ("outputs", _is_tensor), ("variants", _is_variant)):
        if not isinstance(parsed.get(key), list) or not parsed[key] or not all(map(right, parsed[key])):
            raise LibraryError(
                f"{manifest}: {key!r} is missing or not what belongs there; compile the model again"
            )
    if not is_structure(result_of(parsed), len(parsed["outputs"])):
        raise LibraryError(f"{manifest}: 'result' is not what belongs there; compile the model again")
    batches = parsed.setdefault("batch_sizes", [])
    if not isinstance(batches, list) or not all(type(size) is int for size in batches):
        raise LibraryError(f"{manifest}: 'batch_sizes' is no list of integers; compile the model again")
    for key, fits in (
        ("preparation", is_preparation),
        ("class_names", are_class_names),
        ("checks", is_entry),
        ("classified", lambda name: name is None or isinstance(name, str)),
    ):
        if not fits(parsed.get(key)):
            raise LibraryError(f"{manifest}: {key!r} is not what belongs there; compile the model again")
    return parsed


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(size, str) or (type(size) is int and 0 <= size < 2**63) for size in entry["shape"])
    )


def _is_variant(entry: Any) -> bool:
    features = entry.get("features", []) if isinstance(entry, dict) else None
    return (
        isinstance(features, list)
        and all(isinstance(name, str) for name in features)
        and all(isinstance(entry.get(key), str) for key in ("file", "target", "sha256"))
        and type(entry.get("size")) is int
        and isinstance(entry.get("machine", ""), str)
        and entry.get("device", "cpu") in ("cpu", "cuda")
    )
