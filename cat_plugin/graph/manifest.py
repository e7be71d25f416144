"""The description of a bundle, ``manifest.json``: read with limits and checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_plugin.cluster_affine.families import MAPS, AffineMap
from cat_plugin.errors import BundleError
from cat_plugin.files import read_json
from cat_plugin.graph.preparation import are_class_names, is_preparation
from cat_plugin.graph.results import is_structure, result_of

__all__ = [
    "CHECKS",
    "CORRECTION",
    "FORMAT",
    "MANIFEST",
    "MODEL",
    "REMEDY",
    "REPORT",
    "VERSION",
    "corrections",
    "read_manifest",
]

FORMAT = "cat-bundle"
VERSION = 1
MODEL = "model.pt2"
CORRECTION = "cluster_affine.safetensors"
REPORT = "report.json"
CHECKS = "checks.safetensors"
MANIFEST = "manifest.json"
REMEDY = "the bundle is damaged, copy the whole directory again or export again"

# The largest seen has 60 kB; parsed, nested JSON takes up to 25 times its size.
_LIMIT = 2 * 2**20
_KNOWN_FILES = (MODEL, CORRECTION, REPORT, CHECKS)


def corrections() -> dict[str, AffineMap]:
    """Return the maps that a bundle's graph may end in, by the name of the op that applies them."""
    return {applied.op: applied for applied in MAPS.values()}


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check a bundle's manifest.

    Parameters
    ----------
    root : pathlib.Path
        The bundle's directory.

    Returns
    -------
    dict
        Of the shape that docs/bundle.md describes.

    Raises
    ------
    BundleError
        When it is missing, no JSON, or of another format or shape.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{root} is not a bundle: it has no {MANIFEST}; give a directory written by export_bundle"
        )
    manifest = read_json(path, _LIMIT, BundleError, REMEDY)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(
            f"{path} is not a bundle's manifest (its format is not {FORMAT!r}); export the model again"
        )
    if type(manifest.get("version")) is not int or manifest["version"] != VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('version')!r:.40}; this release reads {VERSION}: "
            "use the release that wrote it, or export again"
        )
    _check_files(path, manifest.get("files"))
    for key, right in _PARTS.items():
        if key not in manifest or not right(manifest[key]):
            raise BundleError(f"{path}: {key!r} is missing or not what belongs there; export again")
    for key, right in _OPTIONAL.items():
        if not right(manifest.get(key)):
            raise BundleError(f"{path}: {key!r} is not what belongs there; export again")
    if not is_structure(result_of(manifest), len(manifest["outputs"])):
        raise BundleError(f"{path}: 'result' is not what belongs there; export again")
    if (CORRECTION in manifest["files"]) != (manifest["cluster_affine"] is not None):
        raise BundleError(f"{path}: 'cluster_affine' and the file {CORRECTION} do not agree; export again")
    return manifest


def _check_files(path: Path, files: Any) -> None:
    # A fixed set of plain names: a manifest cannot point anywhere else.
    if not isinstance(files, dict) or MODEL not in files or not set(files) <= set(_KNOWN_FILES):
        found = sorted(files) if isinstance(files, dict) else files
        raise BundleError(f"{path} lists files {found!r:.200}; expected {_KNOWN_FILES}")
    for name, entry in files.items():
        if not (isinstance(entry, dict) and _count(entry.get("size")) and _is_sha256(entry.get("sha256"))):
            raise BundleError(
                f"{path}: the entry of {name} needs an integer size and a sha256 string; export again"
            )


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(map(_count, value))


def _is_signature(value: Any) -> bool:
    """Return whether it lists tensors: name, dtype and shape, of which an extent may be a name."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(extent, str) or _count(extent) for extent in entry["shape"])
        for entry in value
    )


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and isinstance(layer.get("kind"), str)
        and _is_shape(layer.get("weight_shape"))
        and all(layer.get(bits) is None or _count(layer[bits]) for bits in ("w_bits", "a_bits"))
        for layer in value
    )


def _is_correction(value: Any) -> bool:
    """Return whether it names an op that there is, with alpha and shapes that go with it; or is null."""
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        return False
    applied, alpha, shapes = corrections().get(value["op"]), value.get("alpha"), value.get("shapes")
    if applied is None or not isinstance(alpha, int | float) or isinstance(alpha, bool):
        return False
    if not 0.0 <= alpha <= 1.0 or not isinstance(shapes, dict) or set(shapes) != set(applied.arrays):
        return False
    if not all(map(_is_shape, shapes.values())):
        return False
    # Which output it corrects, and where its classes are; earlier releases say neither.
    if not isinstance(value.get("output", ""), str | None) or not isinstance(
        value.get("class_axis", 1), int | None
    ):
        return False
    given = {name: tuple(shape) for name, shape in shapes.items()}
    return applied.expected_shapes(given) == given


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_PARTS = {
    "inputs": _is_signature,
    "outputs": _is_signature,
    "layers": _are_layers,
    "cluster_affine": _is_correction,
    "calibration": _is_mapping,
    "libraries": _is_mapping,
}
_OPTIONAL = {"preparation": is_preparation, "class_names": are_class_names}
