"""Run a function once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["PostImportHook"]


class _NotifyingLoader(importlib.abc.Loader):
    """A loader that calls back after the loader that it stands in front of has run the module."""

    def __init__(self, inner: importlib.abc.Loader, callback: Callable[[ModuleType], None]) -> None:
        self._inner = inner
        self._callback = callback

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is to see its own loader, as if nobody stood in between (pkgutil and inspect ask it).
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._callback(module)


class PostImportHook(importlib.abc.MetaPathFinder):
    """Call functions when modules are first imported, or at once for those that are already there.

    Parameters
    ----------
    callbacks : dict
        From the full name of a module to a function of that module.
    """

    def __init__(self, callbacks: dict[str, Callable[[ModuleType], None]]) -> None:
        self._callbacks = callbacks
        self._looking = threading.local()

    def install(self) -> None:
        """Start watching; modules already imported are reported now."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for name, callback in self._callbacks.items():
            module = sys.modules.get(name)
            # A module that is being imported at this moment has no complete namespace yet.
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                callback(module)

    def remove(self) -> None:
        """Stop watching."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a watched module by the other finders, and put the notifying loader in front of its own."""
        callback = self._callbacks.get(fullname)
        if callback is None or getattr(self._looking, "name", None) == fullname:
            return None
        self._looking.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.name = None
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _NotifyingLoader(spec.loader, callback)
        return spec
