"""Save and load what a host made: tensors in safetensors, everything else in JSON, no pickle.

A directory holds ``model.safetensors`` and ``cat.json``. It is written beside its final place and
renamed, so that it is whole or absent; loading checks the hash of the tensors first.

The quantized model is described in one of two ways. A graph (the low-bit engine, static int8) is
written node by node and needs nothing else to be loaded. A model of which the host replaced some
layers (weight-only algorithms) is written as these layers, and is loaded into a copy of the
full-precision model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from cat_plugin.correction import CorrectedModule
from cat_plugin.errors import BundleError, CATError, CATTypeError
from cat_plugin.files import checked, read_json, sha256_of, staged_directory, write_errors
from cat_plugin.serialization.structure import (
    decode_graph,
    decode_module,
    encode_graph,
    encode_module,
    tensors_of,
)
from cat_plugin.torch_compat import register_quantized_decomposed

__all__ = ["is_saved", "load", "save"]

FORMAT = "cat-model"
VERSION = 1
TENSORS = "model.safetensors"
MANIFEST = "cat.json"
_HOST = "neural_compressor."
_LIMIT = 32 * 2**20
_REMEDY = "it is damaged, save the model again"


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that the host put in."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and type(module).__module__.startswith(_HOST):
            found[path] = module
    return found


def _describe(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, fx.GraphModule):
        return {"kind": "graph", **encode_graph(model)}
    return {
        "kind": "layers",
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "replaced": {path: encode_module(module) for path, module in _replaced(model).items()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("cat-ptq", "torch", "neural-compressor", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies where two names share memory, which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return out


def save(module: nn.Module, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Path:
    """Write a corrected model.

    Parameters
    ----------
    module : CorrectedModule
        What :func:`cat_plugin.correct`, a recipe or a host returned (the 2.x host's wrapper of it is
        understood too).
    directory : path
        Where to. A model that was saved there before is replaced; anything else is refused.
    *args, **kwargs
        Ignored; the hosts' own ``save`` functions pass example inputs or a format.

    Returns
    -------
    pathlib.Path
        The directory.

    Raises
    ------
    ExportError
        When the quantized model holds something that cannot be written as plain data; the message
        names it.
    BundleError
        When `directory` holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    inner = getattr(module, "_model", module)
    if not isinstance(inner, CorrectedModule):
        raise CATTypeError(
            f"a {type(module).__name__} cannot be saved; expected a corrected model, as cat_plugin.correct, a recipe "
            "or Neural Compressor with CAT returns it"
        )
    final = Path(directory).absolute()
    if final.exists() and not (final.is_dir() and ((final / MANIFEST).exists() or not any(final.iterdir()))):
        raise BundleError(f"{final} holds something that is not a saved model; give a new directory")
    tensors = {f"model.{name}": value for name, value in tensors_of(inner.model).items()}
    step = inner.correction
    if step is not None:
        tensors |= {f"correction.{name}": value for name, value in tensors_of(step).items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "versions": _versions(),
        "config": inner.config,
        "report": inner.report,
        "correction": step
        and {"mode": step.mode, "alpha": step.alpha, "leaf": inner.leaf, "class_axis": inner.class_axis},
        "model": _describe(inner.model),
    }
    with (
        write_errors(BundleError, f"a model to {directory}", SafetensorError),
        staged_directory(final) as staged,
    ):
        save_file(_unshared(tensors), staged / TENSORS)
        manifest["sha256"] = sha256_of(staged / TENSORS)
        manifest["size"] = (staged / TENSORS).stat().st_size
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str), "utf-8")
    return final


def is_saved(directory: object) -> bool:
    """Whether a path is a directory that :func:`save` wrote."""
    return isinstance(directory, (str, os.PathLike)) and (Path(directory) / MANIFEST).is_file()


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as load_tensors

    if not is_saved(directory):
        raise BundleError(f"{directory} is not a saved model: it has no {MANIFEST}")
    manifest = read_json(directory / MANIFEST, _LIMIT, BundleError, _REMEDY)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{directory} is not a saved model: {MANIFEST} does not say format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise BundleError(
            f"{directory} has version {manifest.get('version')} of the format; this release reads version {VERSION}"
        )
    entry = {"size": manifest.get("size"), "sha256": manifest.get("sha256")}
    with checked(directory / TENSORS, entry, BundleError, _REMEDY) as stream:
        try:
            return manifest, load_tensors(stream.read())
        except SafetensorError as error:
            raise BundleError(f"{directory / TENSORS} is damaged: {error}") from None


def _load_layers(
    description: dict[str, Any], tensors: dict[str, torch.Tensor], model: nn.Module | None, directory: Path
) -> nn.Module:
    if model is None:
        raise CATTypeError(
            f"{directory} holds the layers that the host replaced, not the whole model; pass the full-precision model, "
            f"a {description['class']}, as load(directory, model=...)"
        )
    built = copy.deepcopy(model).eval()
    for path, layer in description["replaced"].items():
        try:
            built.get_submodule(path)
        except AttributeError:
            raise BundleError(
                f"the model given, a {type(model).__qualname__}, has no layer {path}, which the saved one (a "
                f"{description['class']}) has; pass the model that was quantized"
            ) from None
        parent, _, last = path.rpartition(".")
        setattr(built.get_submodule(parent), last, decode_module(layer, tensors, f"{path}."))
    rest = {name: value for name, value in built.state_dict().items() if isinstance(value, torch.Tensor)}
    different = [
        name for name, value in rest.items() if name not in tensors or tensors[name].shape != value.shape
    ]
    if different:
        raise BundleError(
            f"the model given, a {type(model).__qualname__}, differs from the saved one (a {description['class']}) in "
            f"{', '.join(different[:3])}; pass the model that was quantized"
        )
    built.load_state_dict({name: tensors[name] for name in rest}, assign=True)
    return built


def _corrected(
    inner: nn.Module, step: dict[str, Any] | None, tensors: dict[str, torch.Tensor]
) -> CorrectedModule:
    from cat_plugin.cluster_affine import AffineParameters
    from cat_plugin.cluster_affine.families import MAPS
    from cat_plugin.graph.module import ClusterAffineModule

    if step is None:
        return CorrectedModule(inner, None)
    arrays = {name: tensors[f"correction.{name}"].numpy() for name in MAPS[step["mode"]].arrays}
    parameters = AffineParameters(mode=step["mode"], alpha=float(step["alpha"]), **arrays)
    # Files of earlier releases correct the only result, (N, C).
    where = int(step.get("leaf", 0)), int(step.get("class_axis", 1))
    return CorrectedModule(inner, ClusterAffineModule(parameters), None, *where)


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> CorrectedModule:
    """Read a corrected model back; its logits are those of the one that was saved, to the bit.

    Parameters
    ----------
    directory : path
        What :func:`save` wrote.
    model : torch.nn.Module, optional
        The full-precision model. Needed where the base was a weight-only algorithm of the host, which
        keeps the model and replaces layers in it; left as it is.

    Returns
    -------
    CorrectedModule

    Raises
    ------
    BundleError
        When a file is missing, damaged or of another version, or does not fit `model`.
    CATTypeError
        When `model` is needed and not given.
    """
    directory = Path(directory)
    manifest, tensors = _read(directory)
    register_quantized_decomposed()  # quantized graphs call these ops
    parts = {
        name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")
    }
    try:
        description = manifest["model"]
        step = manifest["correction"]
        if description["kind"] == "graph":
            inner: nn.Module = decode_graph(description, parts)
        else:
            inner = _load_layers(description, parts, model, directory)
        loaded = _corrected(inner, step, tensors)
        loaded.config, loaded.report = manifest["config"], manifest["report"]
    except CATError:
        raise
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise BundleError(
            f"{directory} is damaged, or was written by another release: {type(error).__name__}: {error}"
        ) from error
    return loaded
