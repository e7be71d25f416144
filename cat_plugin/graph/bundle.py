"""The bundle: a directory with everything that is handed over, and nothing else.

``model.pt2``
    The QDQ graph, written by :func:`torch.export.save`.
``cluster_affine.safetensors``
    The numbers of the cluster-affine step, for reading without PyTorch.  Absent when there is no step.
``report.json``
    How the model came about: losses, trials, clusters.  For people only; absent when nobody recorded it.
``manifest.json``
    Format version, sha256 and size of each file, signature, bit-widths, library versions.

A bundle is written beside its final place and renamed, so that it is whole or absent.  Reading checks
sizes and hashes before anything is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cat_plugin.errors import BundleError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

__all__ = ["Bundle", "export_bundle", "read_bundle", "sha256_of"]

FORMAT = "cat-bundle"
VERSION = 1
MODEL = "model.pt2"
CORRECTION = "cluster_affine.safetensors"
REPORT = "report.json"
MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 16 * 2**20
_REPORT_LIMIT = 32 * 2**20
_KNOWN_FILES = (MODEL, CORRECTION, REPORT)
_LIBRARIES = ("torch", "numpy", "scikit-learn", "safetensors", "neural-compressor", "torchao")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as a hexadecimal string."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    from cat_plugin import __version__

    found = {"cat-ptq": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(staged: Path, final: Path) -> None:
    """Put `staged` in the place of `final`, whatever stands there, with no moment of a half-written one."""
    retired: Path | None = None
    if final.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        final.rename(retired / final.name)
    try:
        staged.rename(final)
    except OSError:
        if retired is not None:
            (retired / final.name).rename(final)
        raise
    finally:
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    _sync(final.parent)


def export_bundle(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: tuple[torch.Tensor, ...] | torch.Tensor,
    directory: str | os.PathLike[str],
    *,
    calibration: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Write a quantized, corrected model as a bundle.

    Parameters
    ----------
    module : torch.nn.Module or torch.export.ExportedProgram
        What :func:`cat_plugin.correct`, the engine or a host returned, or its exported graph.
    example_inputs : tensor or tuple of tensors
        One batch, for shapes and dtypes only: it is not stored.
    directory : path
        Where the bundle goes.  A bundle that stands there is replaced; anything else is refused.
    calibration : mapping, optional
        A JSON-able summary of the calibration (number of samples, seed, settings), stored as it is.
    report : mapping, optional
        A JSON-able account of the quantization, see :mod:`cat_plugin.report.record`; by default what `module` itself
        remembers (``report`` and ``config`` of a :class:`~cat_plugin.correction.CorrectedModule`).

    Returns
    -------
    pathlib.Path
        The bundle's directory.

    Raises
    ------
    ExportError
        When the model cannot be exported as a QDQ graph.
    BundleError
        When `directory` holds something that is not a bundle, or cannot be written.
    """
    import torch
    from safetensors.numpy import save_file
    from torch.export import ExportedProgram

    from cat_plugin.graph.export import export_program
    from cat_plugin.graph.inspect import find_correction, quantized_layers, signature

    final = Path(directory).absolute()
    if final.exists() and not (final / MANIFEST).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise BundleError(
            f"{directory} exists and is not a bundle (no {MANIFEST} in it); give a new or empty directory"
        )
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    program = module if isinstance(module, ExportedProgram) else export_program(module, example_inputs)
    correction = find_correction(program)
    account = _account(_remembered(module) if report is None else report)

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **signature(program),
        "layers": [layer.to_dict() for layer in quantized_layers(program)],
        "cluster_affine": correction
        and {
            "op": correction.op,
            "alpha": correction.alpha,
            "shapes": {name: list(array.shape) for name, array in correction.arrays.items()},
        },
        "calibration": dict(calibration or {}),
        "libraries": _versions(),
    }
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise BundleError(
            f"cannot write a bundle to {directory}: {error.strerror}; choose a writable place"
        ) from error
    try:
        staged = staging / final.name
        staged.mkdir()
        # Sample inputs are the one part of the archive that torch pickles; a bundle carries none.
        program._example_inputs = None
        torch.export.save(program, staged / MODEL)
        if correction is not None:
            metadata = {"op": correction.op, "alpha": repr(correction.alpha)}
            contiguous = {name: np.ascontiguousarray(array) for name, array in correction.arrays.items()}
            save_file(contiguous, staged / CORRECTION, metadata=metadata)
        if account:
            (staged / REPORT).write_text(account, encoding="utf-8")
        manifest["files"] = {
            path.name: {"sha256": sha256_of(path), "size": path.stat().st_size}
            for path in sorted(staged.iterdir())
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in staged.iterdir():
            _sync(path)
        _sync(staged)
        _replace_directory(staged, final)
    except OSError as error:
        raise BundleError(
            f"cannot write a bundle to {directory}: {error.strerror}; choose a writable place"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def _remembered(module: Any) -> dict[str, Any]:
    """What a corrected module says of its own making."""
    known = {"engine": getattr(module, "report", None), "config": getattr(module, "config", None)}
    return {key: value for key, value in known.items() if isinstance(value, dict)}


def _account(report: Mapping[str, Any]) -> str:
    """The text of ``report.json``; empty when there is nothing to write."""
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
        import torch.ao.quantization.fx._decomposed  # registers the QDQ ops that the graph refers to

        import cat_plugin.graph.op  # noqa: F401 - registers the cluster-affine ops

        path = self.directory / MODEL
        _check_file(path, self.manifest["files"][MODEL])
        try:
            return torch.export.load(path)
        except Exception as error:
            raise BundleError(
                f"{path} cannot be loaded by torch {torch.__version__}: {error}; "
                f"it was written by torch {self.manifest['libraries'].get('torch', '?')}: use that release or export again"
            ) from error

    def cluster_affine(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Load the numbers of the cluster-affine step, or None when the model has none (needs no torch)."""
        from safetensors.numpy import load_file

        if CORRECTION not in self.manifest["files"]:
            return None
        path = self.directory / CORRECTION
        _check_file(path, self.manifest["files"][CORRECTION])
        arrays: dict[str, np.ndarray[Any, Any]] = load_file(path)
        for name, shape in self.manifest["cluster_affine"]["shapes"].items():
            if name not in arrays or list(arrays[name].shape) != shape:
                raise BundleError(
                    f"{path}: {name} is not the array of shape {shape} that the manifest names; export again"
                )
        return arrays

    def report(self) -> dict[str, Any] | None:
        """Load the account of the quantization, or None when the bundle has none (needs no torch)."""
        if REPORT not in self.manifest["files"]:
            return None
        path = self.directory / REPORT
        entry = self.manifest["files"][REPORT]
        if entry["size"] > _REPORT_LIMIT:
            raise BundleError(f"{path} is larger than {_REPORT_LIMIT} bytes; no report of a bundle is")
        _check_file(path, entry)
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise BundleError(f"{path} is not valid JSON ({error}); export the model again") from error
        if not isinstance(parsed, dict):
            raise BundleError(f"{path} holds a {type(parsed).__name__}; expected a mapping, export again")
        return parsed


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise BundleError(
            f"{path} is missing; the manifest lists it: copy the whole directory, or export again"
        )
    size = path.stat().st_size
    if size != expected["size"]:
        raise BundleError(
            f"{path} has {size} bytes; the manifest says {expected['size']}: the bundle is damaged, copy or export it again"
        )
    if sha256_of(path) != expected["sha256"]:
        raise BundleError(
            f"{path} does not match the sha256 in the manifest: the bundle is damaged or was changed, copy or export it again"
        )


def _check_manifest(path: Path, manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(
            f"{path} is not a bundle's manifest (its format is not {FORMAT!r}); export the model again"
        )
    if manifest.get("version") != VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('version')!r}; this release reads {VERSION}: "
            "use the release that wrote it, or export again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or MODEL not in files or not set(files) <= set(_KNOWN_FILES):
        raise BundleError(
            f"{path} lists files {sorted(files) if isinstance(files, dict) else files!r}; expected {_KNOWN_FILES}"
        )
    for name, entry in files.items():
        entry_ok = (
            isinstance(entry, dict)
            and isinstance(entry.get("size"), int)
            and not isinstance(entry["size"], bool)
            and isinstance(entry.get("sha256"), str)
        )
        if not entry_ok:
            raise BundleError(
                f"{path}: the entry of {name} needs an integer size and a sha256 string; export again"
            )
    parts = {"inputs": list, "outputs": list, "layers": list, "libraries": dict, "calibration": dict}
    for key, kind in parts.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{path}: {key!r} is missing or not a {kind.__name__}; export again")
    step = manifest.get("cluster_affine")
    if (CORRECTION in files) != isinstance(step, dict) or (
        isinstance(step, dict) and not isinstance(step.get("shapes"), dict)
    ):
        raise BundleError(f"{path}: 'cluster_affine' and the file {CORRECTION} do not agree; export again")
    return manifest


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
    path = root / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST}; give a directory written by export_bundle"
        )
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise BundleError(f"{path} is larger than {_MANIFEST_LIMIT} bytes; this is no manifest of a bundle")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error}); the bundle is damaged, export again"
        ) from error
    manifest = _check_manifest(path, parsed)
    for name, entry in manifest["files"].items():
        _check_file(root / name, entry)
    return Bundle(root, manifest)
