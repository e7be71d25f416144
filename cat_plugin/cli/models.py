"""Full-precision models for the command line: a factory in the user's code, and a safetensors file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cat_plugin.errors import CATTypeError, CATValueError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_model"]


def load_model(factory: str, weights: Path | None = None) -> nn.Module:
    """Build a model and load its weights.

    Parameters
    ----------
    factory : str
        ``module:callable``; the module is looked up in the working directory first, the callable takes no argument.
    weights : path, optional
        A ``.safetensors`` file with the model's state dict.

    Raises
    ------
    CATValueError
        When module, callable or weights cannot be found, or do not fit the model.
    CATTypeError
        When the callable does not return a ``torch.nn.Module``.
    """
    from safetensors.torch import load_file
    from torch import nn

    module_name, _, attribute = factory.partition(":")
    if not module_name or not attribute:
        raise CATValueError(
            f"--model {factory!r} is not of the form module:factory, for instance my_model:build"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
    except (ImportError, AttributeError) as error:
        raise CATValueError(
            f"--model {factory!r} cannot be used: {error}; the module must be importable from {Path.cwd()}"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        raise CATTypeError(
            f"--model {factory!r} returned a {type(made).__name__}; expected a torch.nn.Module"
        )
    if weights is not None:
        if not weights.is_file():
            raise CATValueError(f"no weights at {weights}; give a .safetensors file")
        try:
            made.load_state_dict(load_file(weights))
        except Exception as error:  # safetensors and torch each have exceptions of their own
            raise CATValueError(f"the weights in {weights} do not fit {factory}: {error}") from error
    return made.eval()
