"""The hosts: the only part of the package that imports Neural Compressor.

Nothing is imported from here until the host itself is: :func:`register` only leaves a note with the
import system.  ``inc3`` serves the 3.x torch API, ``inc2`` the 2.x Python and YAML API; the releases
3.2 to 3.7 have both.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from cat_plugin.hosts._import_hook import PostImportHook
from cat_plugin.recipe.runners import register_runner

__all__ = ["is_registered", "register", "unregister"]

# The modules of the host that are extended, and the file of ours that does it.
_WATCHED = {
    "neural_compressor.torch.quantization": "cat_plugin.hosts.inc3.patches",
    "neural_compressor.config": "cat_plugin.hosts.inc2.patches",
    "neural_compressor.strategy.strategy": "cat_plugin.hosts.inc2.patches",
    "neural_compressor.quantization": "cat_plugin.hosts.inc2.patches",
    "neural_compressor.conf.config": "cat_plugin.hosts.inc2.patches",
    "neural_compressor.experimental.strategy.strategy": "cat_plugin.hosts.inc2.patches",
    "neural_compressor.experimental.quantization": "cat_plugin.hosts.inc2.patches",
}
_hook: PostImportHook | None = None

# Recipes run also after unregister(): the runner registers for as long as it works.
register_runner("neural_compressor.torch", "cat_plugin.hosts.inc3.run")
register_runner("neural_compressor", "cat_plugin.hosts.inc2.run")


def _attach(host_module: ModuleType) -> None:
    importlib.import_module(_WATCHED[host_module.__name__]).attach(host_module)


def is_registered() -> bool:
    """Whether :func:`register` is in force."""
    return _hook is not None


def register() -> None:
    """Register the ``cat`` algorithm with Neural Compressor, now or when it is first imported.

    Called by ``import cat_plugin``. Calling it twice does no harm; after :func:`unregister` it
    registers again.
    """
    global _hook
    if _hook is None:
        _hook = PostImportHook(dict.fromkeys(_WATCHED, _attach))
        _hook.install()


def unregister() -> None:
    """Undo :func:`register` and every patch of the host made by it."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None
    for name in set(_WATCHED.values()):
        module = sys.modules.get(name)
        if module is not None:
            module.detach()
