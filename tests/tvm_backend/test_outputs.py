"""Models of several inputs and results as libraries: called by place, name or mapping, with the structure of what they return."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tvm_backend
from cat_plugin import correct, export_bundle, load, save
from cat_plugin.batches import ModelCall
from cat_plugin.cli import main
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.errors import LibraryError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.structures import as_structure, leaves_of, names_of
from tests.zoo import Network
from tests.zoo.dense import UNet
from tests.zoo.several import ImageAndTextHeads, TokenClassifier


class Louder(nn.Module):
    """A model with other logits, so that there is something to correct."""

    def __init__(self, model: nn.Module, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = model, axis

    def _louder(self, z: torch.Tensor) -> torch.Tensor:
        return (z.movedim(self.axis, -1) * 1.5 + 0.1 * torch.arange(z.shape[self.axis])).movedim(
            -1, self.axis
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = as_structure(self.inner(*args, **kwargs))
        if isinstance(found, dict):
            return {**found, "logits": self._louder(found["logits"])}
        return self._louder(found)


Made = tuple[Path, nn.Module, Callable[[int], ModelCall]]


class Heads(ImageAndTextHeads):
    """The heads with a constant, nested, and what is no tensor."""

    def forward(self, image: Any, tokens: Any, mask: Any, scale: float = 1.0) -> Any:  # type: ignore[override]
        found = super().forward(image, tokens, mask)
        return {
            "logits": found["logits"] * scale,
            "rest": (found["auxiliary"], [self.words.weight[:2], None]),
        }


def _made(make: Any, folder: Path) -> Made:
    """Quantized, corrected, saved, loaded, exported and compiled."""
    model = Network(make).build()

    def call(rows: int) -> ModelCall:
        if make is UNet:
            generator = torch.Generator().manual_seed(rows)
            return ModelCall((torch.randn(rows, 3, 16, 16, generator=generator),))
        return ModelCall((), make.batch(rows, rows))

    calls = [call(20), call(21)]
    spec = {"w_bits": 8, "a_bits": 8, "preset": "fast"}
    chosen = {"class_axis": 1} if make is UNet else {"logits": "logits"}
    quantized, _ = quantize(model, QuantSpec(**spec, **chosen), calls)
    reference = Louder(model, 1 if make is UNet else -1)
    estimator = ClusterAffine(mode="diagonal", n_clusters=2, alpha=1.0, random_state=0)
    corrected = load(save(correct(quantized, reference, calls, estimator, **chosen), folder / "saved"))
    bundle = export_bundle(corrected, calls[0], folder / "bundle")
    return tvm_backend.compile(bundle, out=folder / "model.so", cache=False).path, corrected, call


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _made(ImageAndTextHeads, tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _made(UNet, tmp_path_factory.mktemp("segmenter"))


def _arrays(call: ModelCall) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in call.kwargs.items()}


def _assert_like(found: Any, wanted: Any) -> None:
    """Equal but for rows in which the sums of torch and the exact ones lie on two sides of a rounding edge."""
    assert names_of(found) == names_of(wanted)
    for mine, other in zip(leaves_of(found), leaves_of(wanted), strict=True):
        assert mine.shape == tuple(other.shape)
        apart = np.abs(mine - other.detach().numpy()) / float(other.abs().max())
        assert np.median(apart) < 1e-5
        assert apart.max() < 0.05


@pytest.mark.parametrize("rows", [1, 5])
def test_pixels_are_corrected_in_the_library(segmenter: Made, rows: int) -> None:
    path, corrected, call = segmenter
    library = tvm_backend.load(path, verify=True)
    (images,) = call(rows).args
    with torch.no_grad():
        found, wanted, plain = library(images.numpy()), corrected(images), corrected.model(images)
    assert type(found) is np.ndarray
    _assert_like(found, wanted)
    assert float((wanted - plain).abs().max()) > 0.1 * float(wanted.abs().max())
    assert library(images.numpy()[:0]).shape == (0, 4, 16, 16)


@pytest.mark.parametrize("rows", [1, 5])
def test_inputs_are_given_by_place_by_name_or_as_one_mapping(heads: Made, rows: int) -> None:
    path, corrected, call = heads
    library = tvm_backend.load(path, verify=True)
    given = _arrays(call(rows))
    with torch.no_grad():
        wanted = corrected(**call(rows).kwargs)
    first, *others = given.values()
    rest = dict(zip(list(given)[1:], others, strict=True))
    for found in (
        library(*given.values()),
        library(**dict(reversed(given.items()))),
        library(given),
        library(first, **rest),
        library({"image": first}, **rest),
    ):
        assert list(found) == ["auxiliary", "logits"]
        _assert_like(found, wanted)
    assert isinstance(library(**call(rows).kwargs)["logits"], torch.Tensor)
    for wrong in (
        lambda: library(given, image=first, x=first),
        lambda: library({"image": first, "token": first}),
    ):
        with pytest.raises(LibraryError, match="image, tokens, mask: give each of them once"):
            wrong()
    described = library.manifest
    assert [entry["name"] for entry in described["inputs"]] == ["image", "tokens", "mask"]
    assert [(entry["name"], entry["shape"]) for entry in described["outputs"]] == [
        ("auxiliary", ["batch", 4]),
        ("logits", ["batch", 10]),
    ]
    assert described["classified"] == "logits"


def test_large_batches_run_in_pieces_give_the_same(heads: Made) -> None:
    path, _, call = heads
    library = tvm_backend.load(path)
    given = _arrays(call(300))
    whole, part = library(given), library({name: array[290:] for name, array in given.items()})
    for name in whole:
        np.testing.assert_array_equal(whole[name][290:], part[name])


def test_an_encoder_of_tokens_and_a_mask_returns_a_dict(tmp_path: Path) -> None:
    path, corrected, call = _made(TokenClassifier, tmp_path)
    library = tvm_backend.load(path)
    for rows in (1, 5):
        with torch.no_grad():
            _assert_like(library(_arrays(call(rows))), corrected(**call(rows).kwargs))


def test_structures_around_constants_are_compiled(tmp_path: Path) -> None:
    model = Network(Heads).build()
    call = ModelCall((), {**Heads.batch(20), "scale": 0.5})
    quantized, _ = quantize(model, QuantSpec(w_bits=8, a_bits=8, preset="fast"), [call])
    bundle = export_bundle(quantized, call, tmp_path / "bundle")
    library = tvm_backend.load(tvm_backend.compile(bundle, out=tmp_path / "model.so", cache=False).path)
    batch = Heads.batch(3, 3)
    found = library({name: value.numpy() for name, value in batch.items()})
    with torch.no_grad():
        wanted = quantized(**batch, scale=0.5)
    assert type(found["rest"]) is tuple
    assert found["rest"][1][1] is None
    _assert_like([found["logits"], *found["rest"][1][:1]], [wanted["logits"], *wanted["rest"][1][:1]])
    with pytest.raises(LibraryError, match="does not say which of them is the logits"):
        _ = library.classified


def test_the_command_line_takes_an_array_for_each_input(
    heads: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, corrected, call = heads
    bundle, data, out = path.with_name("bundle"), tmp_path / "data.npz", tmp_path / "out.npz"
    given = _arrays(call(7))
    with torch.no_grad():
        wanted = corrected(**call(7).kwargs)
    labels = wanted["logits"].argmax(1).numpy()
    np.savez(data, labels=labels, **{**given, "tokens": given["tokens"].astype(np.int32)})
    words = [["run", str(path), "--input", str(data), "--out", str(out), "--batch-size", "3"]] * 2
    for word in [*words, ["evaluate", str(bundle), "--data", str(data)]]:
        capsys.readouterr()
        assert main([*word, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["top1_percent"] == 100
    with np.load(out) as arrays:
        _assert_like(dict(arrays), wanted)
    for place in (path, bundle):
        assert main(["inspect", str(place)]) == 0
        shown = "".join(capsys.readouterr().out.split())
        for name in ("image", "tokens", "mask", "auxiliary", "logits"):
            assert name in shown
    for broken, message in (
        ({"image": given["image"]}, "has no array 'tokens'"),
        ({**given, "mask": given["mask"][:3]}, "expected a row of each for every sample"),
    ):
        np.savez(data, **broken)
        assert main(["run", str(path), "--input", str(data)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_segmentation_is_written_and_evaluated(
    segmenter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, corrected, call = segmenter
    (images,) = call(5).args
    with torch.no_grad():
        wanted = corrected(images)
    np.savez(tmp_path / "data.npz", inputs=images.numpy(), labels=wanted.argmax(1).numpy())
    data, out = str(tmp_path / "data.npz"), tmp_path / "out.npz"
    assert main(["run", str(path), "--input", data, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == {"output": [5, 4, 16, 16]}
    with np.load(out) as arrays:
        _assert_like(arrays["output"], wanted)
    assert (
        main(["evaluate", str(path.with_name("bundle")), "--data", data, "--metric", "miou", "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["miou_percent"] == 100 > said["miou_percent_without_correction"] > 0
