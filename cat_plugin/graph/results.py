"""The structure around a model's tensors, as JSON: what a description holds of it, and the structure made again without PyTorch.

A tensor is its number; ``{"tuple": [...]}``, ``{"list": [...]}`` and ``{"dict": {...}}`` hold further ones, and
``{"value": ...}`` what is no tensor: null, true, false, a number or a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Place", "described", "filled", "is_structure", "result_of"]

_DEEPEST = 32


class Place(int):
    """The number of a tensor, in a structure that is described."""


def described(value: Any) -> Any:
    """Describe a structure of tuples, lists and dicts around :class:`Place` and plain values.

    Raises
    ------
    TypeError
        It holds something else.
    """
    if isinstance(value, Place):
        return int(value)
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [described(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): described(item) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} is part of the structure")


def filled(structure: Any, tensors: Sequence[Any]) -> Any:
    """Put tensors in their places of a described structure."""
    if isinstance(structure, int):
        return tensors[structure]
    ((kind, content),) = structure.items()
    if kind == "value":
        return content
    if kind == "dict":
        return {key: filled(item, tensors) for key, item in content.items()}
    items = [filled(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def result_of(manifest: Mapping[str, Any]) -> Any:
    """The structure of a model's results, as the description of its bundle or library has it.

    Those of earlier releases have none: a single result is a tensor there, and several are a tuple.
    """
    found, count = manifest.get("result"), len(manifest["outputs"])
    if found is not None:
        return found
    return 0 if count == 1 else {"tuple": list(range(count))}


def is_structure(value: Any, tensors: int) -> bool:
    """Whether a value read from JSON describes a structure in which each of so many tensors stands once."""
    found: list[int] = []
    return _is_part(value, found, _DEEPEST) and sorted(found) == list(range(tensors))


def _is_part(value: Any, found: list[int], depth: int) -> bool:
    if type(value) is int:
        found.append(value)
        return True
    if not isinstance(value, dict) or len(value) != 1 or not depth:
        return False
    ((kind, content),) = value.items()
    if kind == "value":
        return content is None or isinstance(content, bool | int | float | str)
    fits = (
        isinstance(content, dict)
        if kind == "dict"
        else kind in ("tuple", "list") and isinstance(content, list)
    )
    return fits and all(
        _is_part(item, found, depth - 1) for item in (content.values() if kind == "dict" else content)
    )
