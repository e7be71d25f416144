"""Full-precision models for the command line: a factory in the user's code or a library's by name, and weights."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATTypeError, CATValueError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["inputs_of", "load_model"]

_NAMED = 5
_LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}


def _library(prefix: str, model: str) -> Any:
    package = _LIBRARIES[prefix]
    if importlib.util.find_spec(package) is None:
        raise CATValueError(
            f"--model {model!r} needs {package}, which is not installed: pip install {package}, or name a factory of "
            "your own as module:factory"
        )
    try:
        return importlib.import_module("torchvision.models" if prefix == "torchvision" else package)
    except Exception as error:  # torchvision of another release than torch's raises RuntimeError
        raise CATValueError(
            f"--model {model!r} needs {package}, which is installed and cannot be imported ({error}); install the "
            "release that belongs to the installed torch"
        ) from error


def _by_name(prefix: str, name: str, num_classes: int | None) -> nn.Module:
    """A model of timm or torchvision with the weights that it is initialised with; nothing is downloaded."""
    library = _library(prefix, f"{prefix}:{name}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    known = library.list_models()
    if name not in known:
        raise CATValueError(f"{_LIBRARIES[prefix]} has no model {name!r}; {_close(name, known)}")
    if prefix == "timm":
        model: nn.Module = library.create_model(name, pretrained=False, **options)
    else:
        model = library.get_model(name, weights=None, **options)
    return model


def _close(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else f"it has {len(known)} others"


def _from_folder(name: str) -> nn.Module:
    """A Hugging Face image classifier out of a folder, with its output reduced to the logits."""
    import torch
    from torch import nn

    transformers = _library("hf", f"hf:{name}")
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise CATValueError(
            f"--model 'hf:{name}' has no config.json; give a folder that save_pretrained wrote (nothing is downloaded)"
        )

    class Logits(nn.Module):
        """The classifier as a function of one tensor."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(x).logits
            return logits

    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise CATValueError(f"--model 'hf:{name}' cannot be loaded: {error}") from error
    return Logits(model)


def _made_by(factory: str) -> nn.Module:
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
    return made


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """In what a state dict differs from a model's, as counts and some names; empty when it fits."""
    own = model.state_dict()
    kinds = (
        ("missing", [name for name in own if name not in state]),
        ("not the model's", [name for name in state if name not in own]),
        (
            "of another shape",
            [name for name, value in own.items() if name in state and state[name].shape != value.shape],
        ),
    )
    parts = []
    for kind, names in kinds:
        if names:
            more = ", ..." if len(names) > _NAMED else ""
            verb = "is" if len(names) == 1 else "are"
            parts.append(f"{len(names)} {verb} {kind} ({', '.join(names[:_NAMED])}{more})")
    return ", ".join(parts)


def inputs_of(model: nn.Module, given: Collection[str]) -> list[str]:
    """Names of the arguments that a model must be called with, and of those of the others that are given."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        each.name
        for each in inspect.signature(model.forward).parameters.values()
        if each.kind in named and (each.default is each.empty or each.name in given)
    ]


def load_model(model: str, weights: Path | None = None, num_classes: int | None = None) -> nn.Module:
    """Build a model and load its weights.

    Parameters
    ----------
    model : str
        ``module:factory`` (the module is looked up in the working directory first, the factory takes no argument),
        ``timm:NAME`` or ``torchvision:NAME`` (with `weights`), ``hf:FOLDER`` of a Hugging Face image classifier, or an
        ONNX file, of which a Softmax at the end is left out.
    weights : path, optional
        A ``.safetensors`` file with the model's state dict.
    num_classes : int, optional
        For the named models, when it is not the library's default.

    Raises
    ------
    CATValueError
        When module, callable, library or weights cannot be found, or do not fit the model.
    CATTypeError
        When the callable does not return a ``torch.nn.Module``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if model.endswith(".onnx"):
        if weights is not None or num_classes is not None:
            raise CATValueError(
                f"--model {model!r} holds its own weights; leave out --weights and --num-classes"
            )
        from cat_plugin.graph.onnx import load_onnx

        return load_onnx(model, logits=True)
    prefix, _, name = model.partition(":")
    if num_classes is not None and prefix not in ("timm", "torchvision"):
        raise CATValueError(
            f"--num-classes is for timm and torchvision models; {model!r} knows its own number of classes"
        )
    if prefix in ("timm", "torchvision") and name:
        if weights is None:
            raise CATValueError(
                f"--model {model!r} names an architecture without weights, and nothing is downloaded; give a "
                "state dict with --weights FILE.safetensors"
            )
        made = _by_name(prefix, name, num_classes)
    elif prefix == "hf" and name:
        made = _from_folder(name)
    else:
        made = _made_by(model)
    if weights is not None:
        if not weights.is_file():
            raise CATValueError(f"no weights at {weights}; give a .safetensors file")
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CATValueError(
                f"{weights} cannot be read as safetensors: {error}; write it with safetensors.torch.save_file"
            ) from error
        if wrong := _misfits(made, state):
            raise CATValueError(f"the weights in {weights} do not fit {model}: {wrong}")
        made.load_state_dict(state)
    return made.eval()
