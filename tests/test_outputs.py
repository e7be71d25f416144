"""The correction of one result among several, of pixels and of tokens: by hand, saved, and left out where nobody said which."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cat_plugin
from cat_plugin import correct
from cat_plugin.calls import ModelCall, collect_logits
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.correction import CorrectedModule
from cat_plugin.errors import CalibrationError, HostError
from cat_plugin.hosts.pipeline import quantize_and_correct
from cat_plugin.hosts.recording import calibrated
from cat_plugin.logits import LogitsOf
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.structures import leaves_of, names_of
from tests.hosts.conftest import needs_inc3
from tests.zoo import Network
from tests.zoo.dense import UNet
from tests.zoo.several import ImageAndTextHeads, TokenClassifier

ONE_MAP = {"mode": "diagonal", "n_clusters": 1, "alpha": 1.0, "random_state": 0}
FAST = {"w_bits": 3, "a_bits": 4, "preset": "fast", "mode": "diagonal", "num_clusters": 2, "num_samples": 32}


class Given(nn.Module):
    """Returns a structure around its input, which is the logits."""

    def __init__(self, form: str, slope: float = 1.0) -> None:
        super().__init__()
        self.form, self.slope = form, slope
        self.register_buffer("anchors", torch.arange(3.0))

    def forward(self, z: Tensor) -> Any:
        made, other = z * self.slope, z.flatten(1).sum(1)
        forms = {
            "tensor": made,
            "tuple": (other, made),
            "dict": {"boxes": other, "logits": made, "anchors": self.anchors},
            "nested": {"first": {"logits": made}, "second": [other, other]},
        }
        return forms[self.form]


@pytest.mark.parametrize(
    ("form", "logits"),
    [
        ("tensor", "output"),
        ("tensor", 0),
        ("tuple", 1),
        ("tuple", "1"),
        ("dict", "logits"),
        ("dict", 1),
        ("nested", "first.logits"),
    ],
)
@pytest.mark.parametrize(
    ("shape", "axis"), [((4,), 1), ((4, 5, 3), 1), ((7, 4), 2), ((4, 7), 1), ((3, 5, 4), -1)]
)
def test_the_named_result_is_corrected_row_by_row(form: str, logits: Any, shape: Any, axis: int) -> None:
    z = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(0.5, 2.0, 4)
    quantized, reference = Given(form), Given(form)
    reference.slope = slope.view([4 if i == axis % z.ndim else 1 for i in range(z.ndim)])
    # The axis that is meant where none is given.
    said = None if axis == {2: 1, 3: 2, 4: 1}[z.ndim] else axis
    corrected = correct(quantized, reference, z, ClusterAffine(**ONE_MAP), logits=logits, class_axis=said)
    found, wanted, plain = corrected(z), reference(z), quantized(z)
    assert type(found) is type(plain)
    assert names_of(found) == names_of(plain)
    for number, (mine, target, before) in enumerate(
        zip(leaves_of(found), leaves_of(wanted), leaves_of(plain), strict=True)
    ):
        torch.testing.assert_close(mine, target if number == corrected.leaf else before, rtol=1e-4, atol=1e-4)


def test_pixels_are_sampled_the_same_ones_of_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(10, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    calls = [ModelCall((z[:7],)), ModelCall((z[7:],))]
    monkeypatch.setattr("cat_plugin.calls._ROWS", 50)
    first, second = (
        collect_logits(Given("tensor", slope), calls, "quantized", logits=LogitsOf("output"))
        for slope in (1, 2)
    )
    assert first.values.shape == (50, 4)
    np.testing.assert_array_equal(second.values, first.values * 2)
    np.testing.assert_array_equal(first.samples, np.repeat(np.arange(10), 5))
    pixels = z.movedim(1, -1).flatten(1, 2).numpy()
    for row, sample in zip(first.values, first.samples, strict=True):
        assert (pixels[sample] == row).all(1).sum() == 1
    assert len(np.unique(first.values, axis=0)) == 50
    other = collect_logits(Given("tensor"), calls, "quantized", logits=LogitsOf("output"), seed=1)
    assert not np.array_equal(other.values, first.values)


def test_samples_that_were_tuned_on_are_told_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fit = ClusterAffine.fit
    monkeypatch.setattr(
        ClusterAffine, "fit", lambda self, *z, tuned_mask: seen.append(tuned_mask) or fit(self, *z)
    )
    z = torch.randn(10, 4, 6, 6)
    mask = np.arange(10) < 4
    correct(Given("tensor"), Given("tensor", 2), z, ClusterAffine(**ONE_MAP), mask, class_axis=1)
    np.testing.assert_array_equal(seen[0], np.repeat(mask, 36))


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("dict", {"logits": "logit"}, "no output 'logit'.*did you mean 'logits'"),
        ("dict", {"logits": "anchors"}, "no output 'anchors'"),
        ("dict", {"logits": 7}, "no output '7'"),
        ("dict", {"class_axis": 1}, "no output"),
        (
            "dict",
            {},
            "returned a dict for calibration batch 0.*logits= names the output.*boxes, logits, anchors",
        ),
        ("tensor", {}, r"shape \(5, 4, 6\) for calibration batch 0"),
        ("tensor", {"class_axis": 3}, "class_axis=3 is no axis"),
        ("tensor", {"class_axis": 0}, "class_axis=0 is no axis"),
    ],
)
def test_results_that_cannot_be_meant_are_refused(form: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        correct(Given(form), Given(form), torch.randn(5, 4, 6), **options)


def _flow(model: nn.Module, batches: list[Any], **params: Any) -> CorrectedModule:
    calls = [ModelCall((), each) if isinstance(each, dict) else ModelCall((each,)) for each in batches]
    return quantize_and_correct({**FAST, **params}, model, calibrated(model, calls, params), None)


def test_a_segmentation_net_is_corrected_where_its_classes_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Network(UNet).build()
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        without = _flow(model, [images])
    assert without.correction is None
    assert torch.equal(without(images), without.model(images))
    assert any("the correction was left out" in note for note in without.report["notes"])
    assert "the correction was left out" in caplog.text
    corrected = _flow(model, [images], class_axis=1)
    assert corrected.config["class_axis"] == 1
    with torch.no_grad():
        plain, wanted = corrected.model(images), model(images)
    pixels = plain.movedim(1, -1).reshape(-1, 4)
    by_hand = corrected.estimator.predict(pixels.numpy()).reshape(40, 16, 16, 4)
    np.testing.assert_allclose(
        corrected(images).movedim(1, -1).numpy(), by_hand, atol=1e-5 * float(wanted.abs().max())
    )
    assert (corrected(images) - wanted).square().mean() < (plain - wanted).square().mean()


@pytest.mark.parametrize("make", [UNet, ImageAndTextHeads, TokenClassifier])
def test_saved_and_loaded_it_gives_the_same_to_the_bit(make: Any, tmp_path: Any) -> None:
    model = Network(make).build()
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [images] if make is UNet else [make.batch(20, seed) for seed in (1, 2)]
    call = ModelCall((images[:5],)) if make is UNet else ModelCall((), make.batch(5, 9))
    for options in ({}, {"class_axis": 1} if make is UNet else {"logits": "logits"}):
        corrected = _flow(model, batches, **options)
        assert (corrected.correction is None) == (not options)
        loaded = cat_plugin.load(cat_plugin.save(corrected, tmp_path / "saved"))
        wanted, found = (each(*call.args, **call.kwargs) for each in (corrected, loaded))
        assert type(found) is type(wanted)
        assert names_of(found) == names_of(wanted)
        assert all(map(torch.equal, leaves_of(found), leaves_of(wanted)))


@dataclass
class Heads:
    """Registered with the exporter, so that it is returned as it is."""

    logits: Tensor
    rest: Tensor


class Registered(nn.Module):
    """Returns its results as a registered class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Heads:
        return Heads(self.head(x), x)


def test_registered_classes_come_back_from_the_disk_as_dicts(tmp_path: Any) -> None:
    torch.export.register_dataclass(Heads)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    model = Registered().eval()
    quantized, _ = quantize(model, QuantSpec(w_bits=4, a_bits=4, preset="fast"), x)
    corrected = correct(quantized, model, x, ClusterAffine(**ONE_MAP), logits="logits")
    wanted, plain = corrected(x), quantized(x)
    assert type(wanted) is type(plain) is Heads
    assert not torch.equal(wanted.logits, plain.logits)
    found = cat_plugin.load(cat_plugin.save(corrected, tmp_path / "saved"))(x)
    assert list(found) == ["logits", "rest"]
    assert torch.equal(found["logits"], wanted.logits)


class Nested(nn.Module):
    """Takes a dict and a list in one argument, beside a flag, and returns no tensor among tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Network(ImageAndTextHeads).build()

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        found = self.inner(batch["image"], *batch["text"])
        return {"logits": found["logits"] * scale, "rest": (found["auxiliary"], None)}


def test_nested_inputs_survive_saving(tmp_path: Any) -> None:
    def call(rows: int, seed: int) -> ModelCall:
        given = ImageAndTextHeads.batch(rows, seed)
        return ModelCall(
            ({"image": given["image"], "text": [given["tokens"], given["mask"]]},), {"scale": 2.0}
        )

    calls, last = [call(20, 1), call(20, 2)], call(3, 3)
    quantized, _ = quantize(Nested().eval(), QuantSpec(w_bits=8, a_bits=8, preset="fast"), calls)
    corrected = correct(quantized, Nested().eval(), calls, ClusterAffine(**ONE_MAP), logits="logits")
    loaded = cat_plugin.load(cat_plugin.save(corrected, tmp_path / "saved"))
    wanted, found = (each(*last.args, **last.kwargs) for each in (corrected, loaded))
    assert list(found) == ["logits", "rest"]
    assert found["rest"][1] is None
    assert torch.equal(found["logits"], wanted["logits"])
    assert torch.equal(found["rest"][0], wanted["rest"][0])


@needs_inc3
def test_dict_batches_go_through_the_host_and_its_tuning(tmp_path: Any) -> None:
    from neural_compressor.torch.quantization import TuningConfig, autotune, quantize

    model = Network(ImageAndTextHeads).build()
    batches = [ImageAndTextHeads.batch(20, seed) for seed in (1, 2)]

    def run_fn(module: nn.Module) -> None:
        for batch in batches:
            module(**batch)

    config = cat_plugin.CATConfig(**FAST, logits="logits")
    made = quantize(copy.deepcopy(model), config, run_fn=run_fn)
    alone = _flow(model, batches, logits="logits")
    batch = ImageAndTextHeads.batch(5, 9)
    assert torch.equal(made(**batch)["logits"], alone(**batch)["logits"])
    scores = iter([1.0, 0.3, 0.5])
    several = cat_plugin.CATConfig(**{**FAST, "w_bits": [3, 4]}, logits="logits")
    best = autotune(
        copy.deepcopy(model),
        TuningConfig(config_set=[several], tolerable_loss=0.0),
        lambda module: next(scores) + 0 * float(module(**batch)["auxiliary"].sum()),
        run_fn=run_fn,
    )
    assert best.config["w_bits"] == 4
    assert best.correction is not None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "cat: {w_bits: 3, a_bits: 4, preset: fast, mode: diagonal, num_clusters: 2, num_samples: 32, logits: 1}"
    )
    static = tmp_path / "static.yaml"
    static.write_text("cat: {base: static_quant, logits: 1}")
    with pytest.raises(HostError, match=r"gives it image=float32.*takes tensors by place"):
        cat_plugin.load_recipe(static).run(model, batches)
    ran = cat_plugin.load_recipe(recipe).run(model, batches)
    assert torch.equal(ran(**batch)["logits"], alone(**batch)["logits"])


@needs_inc3
def test_an_evaluation_that_raises_stops_the_tuning_with_its_own_error() -> None:
    from neural_compressor.torch.quantization import TuningConfig, autotune

    model = Network(UNet).build()
    images = torch.randn(8, 3, 16, 16)

    def eval_fn(module: nn.Module) -> float:
        raise ZeroDivisionError("no labels at all")

    with pytest.raises(ZeroDivisionError, match="no labels at all"):
        autotune(
            model,
            TuningConfig(config_set=[cat_plugin.CATConfig(**FAST)]),
            eval_fn,
            run_fn=lambda net: net(images),
        )
