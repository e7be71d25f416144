"""Structures of tensors that models take and return: flattened, named, compared leaf by leaf.

A model may say what its results are called, by a list ``output_names`` with a name for each leaf, as an attribute or in ``meta``,
which copies of a graph keep; imported ONNX models do, and what is made of them.

Tuples, lists, dicts, named tuples and what else is registered with ``torch.utils._pytree`` (data classes by
``torch.export.register_dataclass``, the output classes of transformers) are structures.  Other mappings and data classes are
read as the dicts of what they hold, since :mod:`torch.export` cannot return them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cat_plugin.torch_compat import pytree

__all__ = [
    "as_structure",
    "is_plain",
    "leaves_of",
    "names_of",
    "names_of_results",
    "output_names",
    "plain_structure",
]

_PLAIN = (tuple, list, dict)


def as_structure(value: Any) -> Any:
    """What a model returned, with unregistered data classes and mappings as the dicts of what they hold.

    Parameters
    ----------
    value : object
        Any structure.

    Returns
    -------
    object
        `value` itself where nothing is to be replaced.
    """
    if isinstance(value, Tensor) or (type(value) in pytree.SUPPORTED_NODES and type(value) not in _PLAIN):
        return value
    if isinstance(value, Mapping):
        made = {key: as_structure(item) for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = {each.name: as_structure(getattr(value, each.name)) for each in dataclasses.fields(value)}
    elif type(value) in (tuple, list):
        items = [as_structure(item) for item in value]
        unchanged = all(a is b for a, b in zip(items, value, strict=True))
        return value if unchanged else type(value)(items)
    else:
        return value
    same = type(value) is dict and all(made[key] is value[key] for key in made)
    return value if same else made


def plain_structure(value: Any) -> Any:
    """A structure in tuples, lists and dicts alone: registered classes as dicts, or lists where their items have no names."""
    children, spec = pytree.tree_flatten(value, is_leaf=lambda item: item is not value)
    if spec.is_leaf():
        return value
    items = [plain_structure(child) for child in children]
    if type(value) in (tuple, list):
        return type(value)(items)
    names = [_name(path[-1]) for path, _ in _with_paths(value, lambda item: item is not value)]
    return dict(zip(names, items, strict=True))


def leaves_of(value: Any) -> list[Any]:
    """The tensors and plain values of a structure in their order."""
    return pytree.tree_leaves(as_structure(value))


def names_of(value: Any) -> list[str]:
    """A name for each leaf: keys, fields and numbers on the way to it with dots between, ``output`` for a leaf itself.

    Examples
    --------
    >>> names_of({"logits": 1, "aux": (2, 3)})
    ['logits', 'aux.0', 'aux.1']
    """
    return [".".join(map(_name, path)) or "output" for path, _ in _with_paths(as_structure(value))]


def output_names(model: Any) -> list[str] | None:
    """What a model says that its results are called; None where it says nothing."""
    meta = getattr(model, "meta", None)
    for names in (
        getattr(model, "output_names", None),
        meta.get("output_names") if isinstance(meta, dict) else None,
    ):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names) if len(set(names)) == len(names) else None
    return None


def names_of_results(model: Any, value: Any) -> list[str]:
    """A name for each leaf of what a model returned: its own, else those of :func:`names_of`."""
    names, own = names_of(value), output_names(model)
    return own if own is not None and len(own) == len(names) else names


def is_plain(spec: pytree.TreeSpec) -> bool:
    """Whether a structure is of tuples, lists and dicts alone."""
    return spec.is_leaf() or (spec.type in _PLAIN and all(map(is_plain, spec.children())))


def _with_paths(value: Any, is_leaf: Any = None) -> list[tuple[Any, Any]]:
    try:
        return pytree.tree_flatten_with_path(value, is_leaf)[0]
    except ValueError:  # a class that was registered without the names of what it holds
        items = pytree.tree_leaves(value, is_leaf)
        return [((pytree.SequenceKey(number),), item) for number, item in enumerate(items)]


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
