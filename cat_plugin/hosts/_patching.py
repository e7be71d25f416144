"""Changes to the host: each checked before it is made, and each undone on request."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Patches"]

_log = logging.getLogger("cat_plugin")
_MARK = "__cat_plugin_original__"


class Patches:
    """Replacements of functions and methods of the host."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []
        self.refused: dict[str, str] = {}

    def replace(
        self,
        owner: Any,
        name: str,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        parameters: Sequence[str],
    ) -> bool:
        """Put ``make(original)`` in the place of ``owner.name``.

        Parameters
        ----------
        owner : module or class
            Where the name is defined itself; an inherited method is not replaced.
        name : str
            Function, method, class method or static method.
        make : callable
            Given the original function, returns the replacement, which must call it whenever CAT is not
            asked for.
        parameters : sequence of str
            The first parameters that the original must have: the check that it is what was tested.

        Returns
        -------
        bool
            False when the original is missing or different; it is then left alone, and the reason is in
            ``refused``.
        """
        where = f"{getattr(owner, '__name__', owner)}.{name}"
        raw = vars(owner).get(name)
        kind = type(raw) if isinstance(raw, (classmethod, staticmethod)) else None
        original = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        if not callable(original):
            self.refused[where] = "it does not exist in this release"
            _log.debug("%s is not patched: %s", where, self.refused[where])
            return False
        if hasattr(original, _MARK):
            return True
        found = list(inspect.signature(original).parameters)
        if found[: len(parameters)] != list(parameters):
            self.refused[where] = f"its parameters are {found}, not {list(parameters)}"
            _log.warning("%s is not patched: %s", where, self.refused[where])
            return False
        replacement = make(original)
        functools.update_wrapper(replacement, original)
        setattr(replacement, _MARK, original)
        final = kind(replacement) if kind is not None else replacement
        setattr(owner, name, final)
        self._undo.append((owner, name, raw, final))
        return True

    def undo(self) -> None:
        """Put every original back; what someone else replaced after us stays as it is."""
        while self._undo:
            owner, name, raw, final = self._undo.pop()
            if vars(owner).get(name) is final:
                setattr(owner, name, raw)
            else:
                _log.warning("%s.%s was replaced again after CAT; it is left as it is", owner, name)
        self.refused.clear()
