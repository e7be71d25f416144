"""Bundles: what is written is what is read, and damage of any kind is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cat_plugin
from cat_plugin.errors import BundleError, CATError
from cat_plugin.graph.bundle import export_bundle, read_bundle


@pytest.fixture(scope="module")
def written(digits_corrected: Any, digits_split: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "digits"
    return export_bundle(digits_corrected, digits_split.test[0][:2], directory, calibration={"samples": 347})


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_graph_survives_to_the_bit(written: Path, digits_corrected: Any, digits_split: Any) -> None:
    images = digits_split.test[0][:37]
    with torch.no_grad():
        expected = digits_corrected(images)
        got = read_bundle(written).program().module()(images)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_correction_survives_to_the_bit(written: Path, digits_corrected: Any) -> None:
    arrays = read_bundle(written).cluster_affine()
    assert arrays is not None
    buffers = dict(digits_corrected.correction.named_buffers())
    assert arrays.keys() == {"mean", "components", "centroids", "gamma", "beta"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, buffers[name].numpy())


def test_manifest_says_what_is_inside(written: Path) -> None:
    manifest = read_bundle(written).manifest
    bits = [(layer["w_bits"], layer["a_bits"]) for layer in manifest["layers"]]
    assert bits[0] == bits[-1] == (8, 8)
    assert bits[1:-1] == [(2, 2)] * 8
    assert [layer["kind"] for layer in manifest["layers"]] == ["conv2d"] * 9 + ["linear"]
    assert manifest["inputs"][0]["shape"] == ["N", 1, 8, 8]
    assert manifest["outputs"][0]["shape"] == ["N", 10]
    assert manifest["cluster_affine"]["op"] == "cluster_affine"
    assert manifest["cluster_affine"]["shapes"]["gamma"] == [8, 10]
    assert manifest["calibration"] == {"samples": 347}
    assert manifest["libraries"]["torch"] == torch.__version__


def test_archive_holds_no_pickled_samples(written: Path) -> None:
    with zipfile.ZipFile(written / "model.pt2") as archive:
        assert not [name for name in archive.namelist() if "sample_inputs" in name and archive.read(name)]


def test_no_path_of_the_machine_that_wrote_it_is_inside(written: Path) -> None:
    contents = [path.read_bytes() for path in written.iterdir()]
    with zipfile.ZipFile(written / "model.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    places = {Path(cat_plugin.__file__).parents[1], Path(torch.__file__).parents[1], written.parent}
    for place in {str(each).encode() for each in places}:
        assert not [content for content in contents if place in content]
    assert b"nn_module_stack" in b"".join(contents)  # a layer's name is found through it


def test_no_path_is_inside_an_inner_graph(tmp_path: Path) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    directory = export_bundle(Branches(), torch.ones(2, 3), tmp_path / "b")
    with zipfile.ZipFile(directory / "model.pt2") as archive:
        assert not [name for name in archive.namelist() if b"stack_trace" in archive.read(name)]
    x = -torch.ones(4, 3)
    torch.testing.assert_close(read_bundle(directory).program().module()(x), x - 1)


def test_reads_without_torch(written: Path) -> None:
    code = (
        "import sys; from cat_plugin.graph.bundle import read_bundle; b = read_bundle(sys.argv[1]);"
        "assert b.cluster_affine()['gamma'].shape == (8, 10);"
        "bad = {'torch', 'sklearn', 'neural_compressor', 'tvm'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(written)], check=True)


@pytest.mark.parametrize("name", ["model.pt2", "cluster_affine.safetensors"])
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_changed_byte_is_refused(bundle: Path, name: str, place: float) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} does not match the sha256"):
        read_bundle(bundle)


def test_change_after_reading_is_refused(bundle: Path) -> None:
    read = read_bundle(bundle)
    content = bytearray((bundle / "model.pt2").read_bytes())
    content[100] ^= 1
    (bundle / "model.pt2").write_bytes(content)
    with pytest.raises(BundleError, match="does not match"):
        read.program()


@pytest.mark.parametrize("name", ["model.pt2", "cluster_affine.safetensors"])
def test_truncated_or_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    with pytest.raises(BundleError, match="bytes; the manifest says"):
        read_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match="is missing"):
        read_bundle(bundle)


def _edit(bundle: Path, **changes: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "not a bundle's manifest"),
        ({"version": 2}, "format version 2"),
        ({"version": "1"}, "format version '1'"),
        ({"files": []}, "lists files"),
        ({"files": {"../../etc/passwd": {"sha256": "0", "size": 1}}}, "lists files"),
        ({"files": {"model.pt2": {"sha256": 3, "size": 1}}}, "needs an integer size"),
        ({"files": {"model.pt2": {"sha256": "0", "size": True}}}, "needs an integer size"),
        ({"layers": None}, "'layers' is missing"),
        ({"cluster_affine": None}, "do not agree"),
    ],
)
def test_manifest_of_another_shape_is_refused(bundle: Path, changes: dict[str, Any], message: str) -> None:
    _edit(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "cluster_affinity"},
        {"op": 3},
        {"alpha": 1.5},
        {"alpha": float("nan")},
        {"alpha": True},
        {"alpha": None},
        {"shapes": {}},
        {"op": "cluster_affine_full"},
        {"gamma": [8, 9]},
        {"centroids": []},
        {"beta": [8.0, 10]},
    ],
)
def test_manifest_of_an_impossible_correction_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    step = json.loads((bundle / "manifest.json").read_text())["cluster_affine"]
    shapes = {name: changes.get(name, shape) for name, shape in step["shapes"].items()}
    _edit(bundle, cluster_affine=step | {"shapes": shapes} | {k: v for k, v in changes.items() if k in step})
    with pytest.raises(BundleError, match="'cluster_affine' is missing or not what belongs there"):
        read_bundle(bundle)


def test_manifest_with_another_factor_than_was_fitted_is_refused(bundle: Path) -> None:
    step = json.loads((bundle / "manifest.json").read_text())["cluster_affine"]
    _edit(bundle, cluster_affine=step | {"alpha": step["alpha"] / 2})
    with pytest.raises(BundleError, match=r"is a correction with alpha .*, and the manifest says"):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null"])
def test_manifest_that_is_no_object_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_bundle(bundle)


def test_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        read_bundle(tmp_path)


def test_replaces_a_bundle_and_nothing_else(
    bundle: Path, digits_corrected: Any, digits_split: Any, tmp_path: Path
) -> None:
    images = digits_split.test[0][:2]
    (bundle / "stale.txt").write_text("old")
    export_bundle(digits_corrected, images, bundle)
    assert {path.name for path in bundle.iterdir()} == {
        "model.pt2", "cluster_affine.safetensors", "checks.safetensors", "manifest.json",
    }  # fmt: skip
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        export_bundle(digits_corrected, images, precious)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_failure_leaves_nothing(digits_split: Any, tmp_path: Path) -> None:
    class Unexportable(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, : int(x.sum()) % 3 + 1]

    with pytest.raises(CATError):
        export_bundle(Unexportable(), digits_split.test[0][:2], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_uncorrected_model_has_no_correction_file(
    digits_corrected: Any, digits_split: Any, tmp_path: Path
) -> None:
    directory = export_bundle(digits_corrected.model, digits_split.test[0][:2], tmp_path / "plain")
    read = read_bundle(directory)
    assert read.cluster_affine() is None
    assert read.manifest["cluster_affine"] is None
    assert sorted(path.name for path in directory.iterdir()) == [
        "checks.safetensors",
        "manifest.json",
        "model.pt2",
    ]


def test_report_is_kept_and_hashed(digits_corrected: Any, digits_split: Any, tmp_path: Path) -> None:
    account = {"engine": {"layers": [{"name": "stem.0", "loss_after": 0.5}]}}
    export_bundle(digits_corrected, digits_split.test[0][:2], tmp_path / "b", report=account)
    assert read_bundle(tmp_path / "b").report() == account
    (tmp_path / "b" / "report.json").write_text("{}")
    with pytest.raises(BundleError, match=r"report\.json has"):
        read_bundle(tmp_path / "b")


def test_bundle_without_a_report(bundle: Path) -> None:
    assert read_bundle(bundle).report() is None


def test_report_that_json_cannot_hold(digits_corrected: Any, digits_split: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="finite numbers"):
        export_bundle(
            digits_corrected, digits_split.test[0][:2], tmp_path / "b", report={"loss": float("nan")}
        )
    assert not any(tmp_path.iterdir())
