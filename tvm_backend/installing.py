"""A finished library put in its place, and the account of it; without TVM, so that what is kept is handed out at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_plugin.files import locked, sync
from cat_plugin.graph.preparation import preparation_of
from cat_plugin.graph.results import result_of
from tvm_backend.report import CompileReport, KernelEntry

__all__ = ["CHECKS", "install", "of_the_user", "report_of"]

CHECKS = "checks.safetensors"


def of_the_user(manifest: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the model's user calls its inputs, outputs and classes; the same code may serve models that differ in these.

    Parameters
    ----------
    manifest : dict
        The description of a library.
    known : mapping
        That of its bundle, or what :func:`cat_plugin.graph.inspect.signature` says of its program.

    Returns
    -------
    dict
        The description with names, the structure of the results, how inputs are prepared, and which output is the logits.
    """
    how = preparation_of(known)
    named = {
        key: [{**mine, "name": other["name"]} for mine, other in zip(manifest[key], known[key], strict=True)]
        for key in ("inputs", "outputs")
    }
    return {
        **manifest,
        **named,
        "result": result_of(known),
        "preparation": None if how is None else how.to_dict(),
        "class_names": known.get("class_names"),
        "classified": (known.get("cluster_affine") or {}).get("output"),
    }


def install(manifest: dict[str, Any], staging: Path, path: Path) -> dict[str, Any]:
    """Put the finished files in their place, the description last: a half-replaced library fails its sha256.

    Parameters
    ----------
    manifest : dict
        The description, with the names of the files in `staging`.
    staging : pathlib.Path
        The directory that holds them.
    path : pathlib.Path
        The library; further variants go beside it.

    Returns
    -------
    dict
        The description as it was written.
    """
    variants = [
        {**variant, "file": path.name if not i else f"{path.stem}.{variant['variant']}.so"}
        for i, variant in enumerate(manifest["variants"])
    ]
    installed = {**manifest, "variants": variants}
    rows = manifest.get("checks")
    if rows is not None:
        installed["checks"] = {**rows, "file": f"{path.stem}.{CHECKS}"}
    written = staging / "library.json"
    written.write_text(json.dumps(installed, indent=2) + "\n", encoding="utf-8")
    for file in staging.iterdir():
        sync(file)
    with locked(path.parent):
        for made, variant in zip(manifest["variants"], variants, strict=True):
            os.replace(staging / made["file"], path.with_name(variant["file"]))
        if rows is not None:
            os.replace(staging / rows["file"], path.with_name(installed["checks"]["file"]))
        os.replace(written, path.with_suffix(".json"))
    sync(path.parent)
    return installed


def report_of(
    manifest: dict[str, Any], path: Path, target: Any, seconds: float, cached: bool
) -> CompileReport:
    """The account of an installed library, from its description."""
    kernels = (KernelEntry(**{**kernel, "output": tuple(kernel["output"])}) for kernel in manifest["kernels"])
    return CompileReport(
        path=path,
        target=str(target),
        variants=tuple(manifest["variants"]),
        kernels=tuple(kernels),
        float_ops=tuple(manifest["float_ops"]),
        batch_sizes=tuple(manifest["batch_sizes"]),
        seconds=seconds,
        cached=cached,
        notes=tuple(f"{each['file']}: {each['checked']}" for each in manifest["variants"] if each["checked"]),
    )
