"""The bundle: a directory with everything that is handed over, and nothing else.

``model.pt2``
    The QDQ graph, written by :func:`torch.export.save`.
``cluster_affine.safetensors``
    The numbers of the cluster-affine step, for reading without PyTorch.  Absent when there is no step.
``checks.safetensors``
    A few rows of inputs with the model's outputs, by which a compiled library is checked.  Absent when they were not wanted.
``report.json``
    How the model came about: losses, trials, clusters.  For people only; absent when nobody recorded it.
``manifest.json``
    Format version, sha256 and size of each file, signature, bit-widths, library versions.

A bundle is written beside its final place and renamed, so that it is whole or absent.  Reading checks
sizes and hashes before anything is parsed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cat_plugin.errors import BundleError, CATValueError
from cat_plugin.files import checked, parse_json, sha256_of, staged_directory, write_errors
from cat_plugin.graph.archive import check_archive
from cat_plugin.graph.arrays import array_bytes, array_shapes
from cat_plugin.graph.checks import Checks
from cat_plugin.graph.manifest import (
    CHECKS,
    CORRECTION,
    FORMAT,
    MANIFEST,
    MODEL,
    REMEDY,
    REPORT,
    VERSION,
    read_manifest,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch.export import ExportedProgram

    from cat_plugin.graph.preparation import Preparation

__all__ = ["MANIFEST", "Bundle", "export_bundle", "read_bundle", "sha256_of"]

_REPORT_LIMIT = 32 * 2**20
_LIBRARIES = ("torch", "numpy", "scikit-learn", "safetensors", "neural-compressor", "torchao")


def _versions() -> dict[str, str]:
    from cat_plugin.version import __version__

    found = {"cat-ptq": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def export_bundle(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    directory: str | os.PathLike[str],
    *,
    calibration: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    preparation: Preparation | None = None,
    class_names: Sequence[str] | None = None,
    checks: bool = True,
) -> Path:
    """Write a quantized, corrected model as a bundle.

    Parameters
    ----------
    module : torch.nn.Module or torch.export.ExportedProgram
        What :func:`cat_plugin.correct`, the engine or a host returned, or its exported graph, which loses its
        example inputs and the lines of source that its nodes came from.
    example_inputs : tensor, tuple or mapping
        One batch, for shapes and dtypes: a tensor, a tuple of the positional arguments, or a mapping of keyword arguments, as
        the model will be called; its first rows, at most five and 4 MiB, are stored as `checks` says.
    directory : path
        Where the bundle goes.  A bundle that stands there is replaced; anything else is refused.
    calibration : mapping, optional
        A JSON-able summary of the calibration (number of samples, seed, settings), stored as it is.
    report : mapping, optional
        A JSON-able account of the quantization, see :mod:`cat_plugin.report.record`; by default what `module` itself
        remembers (``report`` and ``config`` of a :class:`~cat_plugin.correction.CorrectedModule`).
    preparation : Preparation, optional
        How images become the model's inputs (:class:`cat_plugin.graph.preparation.Preparation`); stored, and done by
        whoever runs the model on images.
    class_names : sequence of str, optional
        A name for each output of the classifier, stored.
    checks : bool, default True
        Whether rows of `example_inputs` are stored with the model's outputs, by which a library that is compiled from the
        bundle is checked, here and where it runs.  Say no where the data must not be handed over.

    Returns
    -------
    pathlib.Path
        The bundle's directory.

    Raises
    ------
    ExportError
        When the model cannot be exported as a QDQ graph, or an exported graph does not run on `example_inputs`.
    BundleError
        When `directory` holds something that is not a bundle, or cannot be written.
    CATValueError
        When `class_names` are not as many as the model has classes.
    """
    import torch
    from torch.export import ExportedProgram

    from cat_plugin.graph.export import example_call, export_program
    from cat_plugin.graph.inspect import find_correction, quantized_layers, signature
    from cat_plugin.graph.sampling import make_checks

    final = Path(directory).absolute()
    if final.exists() and not (final / MANIFEST).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise BundleError(
            f"{directory} exists and is not a bundle (no {MANIFEST} in it); give a new or empty directory"
        )
    if isinstance(module, ExportedProgram):
        program = module
    else:
        program = export_program(module, example_inputs)
        example_inputs = example_call(module, example_inputs).tensors
    kept = make_checks(program, example_inputs).to_bytes() if checks else b""
    correction, described = find_correction(program), signature(program)
    corrected = None
    if correction is not None and correction.output is not None:
        corrected = described["outputs"][correction.output]
    account = _account(_remembered(module) if report is None else report)

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **described,
        "layers": [layer.to_dict() for layer in quantized_layers(program)],
        "cluster_affine": correction
        and {
            "op": correction.op,
            "alpha": correction.alpha,
            "shapes": {name: list(array.shape) for name, array in correction.arrays.items()},
            "output": corrected and corrected["name"],
            "class_axis": correction.class_axis,
        },
        "calibration": dict(calibration or {}),
        "preparation": None if preparation is None else preparation.to_dict(),
        "class_names": None if class_names is None else list(class_names),
        "libraries": _versions(),
    }
    if class_names is not None:
        classified = corrected or described["outputs"][0]
        axis = 1 if correction is None or correction.class_axis is None else correction.class_axis
        _check_class_names(class_names, classified["shape"][axis : axis + 1])
    with write_errors(BundleError, f"a bundle to {directory}"), staged_directory(final) as staged:
        # Sample inputs are the one part of the archive that torch pickles; a bundle carries none.
        program._example_inputs = None
        _forget_sources(program)
        # By way of memory: torch ends the whole process when it cannot write an archive to the disk.
        archive = io.BytesIO()
        torch.export.save(program, archive)
        check_archive(archive, final / MODEL)
        (staged / MODEL).write_bytes(archive.getbuffer())
        if correction is not None:
            metadata = {"op": correction.op, "alpha": repr(correction.alpha)}
            (staged / CORRECTION).write_bytes(array_bytes(correction.arrays, metadata))
        if kept:
            (staged / CHECKS).write_bytes(kept)
        if account:
            (staged / REPORT).write_text(account, encoding="utf-8")
        manifest["files"] = {
            path.name: {"sha256": sha256_of(path), "size": path.stat().st_size}
            for path in sorted(staged.iterdir())
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return final


def _check_class_names(names: Sequence[str], extent: list[Any]) -> None:
    classes = extent[0] if extent else None
    if len(names) != classes:
        raise CATValueError(
            f"{len(names)} class names for {classes} classes; give one for each, in their order"
        )


def _forget_sources(program: ExportedProgram) -> None:
    """Drop the stack traces of all nodes: they name files and hold lines of the machine that exported the model."""
    import torch

    for graph_module in program.graph_module.modules():
        if isinstance(graph_module, torch.fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _remembered(module: Any) -> dict[str, Any]:
    """Return what a corrected module says of its own making."""
    known = {"engine": getattr(module, "report", None), "config": getattr(module, "config", None)}
    return {key: value for key, value in known.items() if isinstance(value, dict)}


def _account(report: Mapping[str, Any]) -> str:
    """Return the text of ``report.json``; empty when there is nothing to write."""
    if not report:
        return ""
    try:
        return json.dumps(report, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"the report cannot be written as JSON: {error}; give finite numbers, strings, lists and mappings"
        ) from error


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked against its manifest.

    Attributes
    ----------
    directory : pathlib.Path
        Where it lies.
    manifest : dict
        The parsed ``manifest.json``.
    """

    directory: Path
    manifest: dict[str, Any]

    def program(self) -> ExportedProgram:
        """Load the QDQ graph (this imports torch).

        Raises
        ------
        BundleError
            When the file changed since the bundle was read, or torch cannot load it.
        """
        import torch

        import cat_plugin.graph.op  # noqa: F401 - registers the cluster-affine ops
        from cat_plugin.graph.inspect import signature
        from cat_plugin.torch_compat import register_quantized_decomposed

        register_quantized_decomposed()  # the graph refers to these ops

        path = self.directory / MODEL
        with checked(path, self.manifest["files"][MODEL], BundleError, REMEDY) as stream:
            check_archive(stream, path)
            stream.seek(0)
            try:
                program = torch.export.load(stream)
            except Exception as error:
                raise BundleError(
                    f"{path} cannot be loaded by torch {torch.__version__}: {error}; it was written by torch "
                    f"{self.manifest['libraries'].get('torch', '?')}: use that release or export again"
                ) from error
        names, plain = (
            [each["name"] for each in described["outputs"]]
            for described in (self.manifest, signature(program))
        )
        if names != plain and len(names) == len(
            plain
        ):  # what the model called them is not in torch's archive
            program.graph_module.meta["output_names"] = names
        return program

    def cluster_affine(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Load the numbers of the cluster-affine step, or None when the model has none (needs no torch)."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if CORRECTION not in self.manifest["files"]:
            return None
        path = self.directory / CORRECTION
        with checked(path, self.manifest["files"][CORRECTION], BundleError, REMEDY) as stream:
            try:
                return dict(load(stream.read()))
            except SafetensorError as error:
                raise BundleError(f"{path} is not a safetensors file ({error}): {REMEDY}") from error

    def checks(self) -> Checks | None:
        """Load the rows that a library is checked by, or None when the bundle has none (needs no torch)."""
        if CHECKS not in self.manifest["files"]:
            return None
        path = self.directory / CHECKS
        with checked(path, self.manifest["files"][CHECKS], BundleError, REMEDY) as stream:
            return Checks.read(stream, path, BundleError, REMEDY)

    def report(self) -> dict[str, Any] | None:
        """Load the account of the quantization, or None when the bundle has none (needs no torch)."""
        if REPORT not in self.manifest["files"]:
            return None
        path = self.directory / REPORT
        entry = self.manifest["files"][REPORT]
        with checked(path, entry, BundleError, REMEDY) as stream:
            parsed = parse_json(stream, path, _REPORT_LIMIT, BundleError, REMEDY)
        if not isinstance(parsed, dict):
            raise BundleError(f"{path} holds a {type(parsed).__name__}; expected a mapping, export again")
        return parsed


def _check_correction(stream: IO[bytes], path: Path, named: Mapping[str, Any]) -> None:
    """Refuse a file of a correction other than the manifest describes."""
    shapes, metadata = array_shapes(stream) or ({}, {})
    if shapes != named["shapes"]:
        raise BundleError(f"{path} does not hold the arrays of the shapes that the manifest names: {REMEDY}")
    described = {"op": named["op"], "alpha": repr(float(named["alpha"]))}
    for key, value in described.items():
        if metadata.get(key, value) != value:
            raise BundleError(
                f"{path} is a correction with {key} {metadata[key]}, and the manifest says {value}: {REMEDY}"
            )


def read_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Open a bundle, checking its manifest and the sha256 of every file first.

    Parameters
    ----------
    directory : path
        What :func:`export_bundle` wrote.

    Returns
    -------
    Bundle
        The graph and the correction are loaded from it on demand.

    Raises
    ------
    BundleError
        When something is missing, damaged or of another format.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    for name, entry in manifest["files"].items():
        with checked(root / name, entry, BundleError, REMEDY) as stream:
            if name == CORRECTION:
                _check_correction(stream, root / name, manifest["cluster_affine"])
    return Bundle(root, manifest)
