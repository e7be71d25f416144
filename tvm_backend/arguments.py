"""The arguments of a call, by place, by name or as one mapping, in the order of a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cat_plugin.errors import LibraryError

__all__ = ["in_order"]


def in_order(names: Sequence[str], inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Put arguments in order.

    Parameters
    ----------
    names : sequence of str
        Of the inputs.
    inputs : tuple
        Arguments by place, or a mapping of all of them.
    named : mapping
        Arguments by name.

    Returns
    -------
    tuple
        As many as were given.

    Raises
    ------
    LibraryError
        A name is missing, unknown or given twice.
    """
    first = inputs[0] if inputs else None
    if len(inputs) == 1 and isinstance(first, Mapping):
        inputs, named = (), {**first, **named}
    if not named:
        return inputs
    left = names[len(inputs) :]
    if set(named) != set(left):
        raise LibraryError(
            f"after {len(inputs)} input(s) in order, {', '.join(sorted(map(str, named)))} were given by name; the model's inputs "
            f"are {', '.join(names)}: give each of them once"
        )
    return (*inputs, *(named[name] for name in left))
