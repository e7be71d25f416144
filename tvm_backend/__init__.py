"""Compile quantized models with TVM to libraries that stand alone.

``compile`` needs PyTorch and TVM's compiler; ``load`` and what it returns need TVM's runtime and numpy only, and neither
import the other's needs.

Examples
--------
>>> import tvm_backend
>>> report = tvm_backend.compile("bundle", target="native", out="model.so")  # doctest: +SKIP
>>> logits = tvm_backend.load("model.so")(images)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_backend.build import compile
    from tvm_backend.report import CompileReport
    from tvm_backend.runtime import Library, load

__all__ = ["CompileReport", "Library", "compile", "load"]

_HOMES = {"CompileReport": "report", "Library": "runtime", "compile": "build", "load": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tvm_backend' has no attribute {name!r}")
    import importlib

    from tvm_backend.garbage import long_lived, seldom_collected

    try:
        with seldom_collected():
            value = getattr(importlib.import_module(f"tvm_backend.{_HOMES[name]}"), name)
            long_lived()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from cat_plugin.errors import CompileError

        raise CompileError(
            "PyTorch is not installed, which reads a bundle's graph: pip install 'cat-ptq[torch]', or compile where it is and copy "
            "the library with the files beside it"
        ) from error
    globals()[name] = value  # what is found once is not asked for again
    return value
