"""Models of several inputs and of several results through the whole engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cat_plugin.errors import CalibrationError, QuantizationError
from cat_plugin.ptq import QuantSpec, quantize, sensitivity
from cat_plugin.structures import leaves_of, names_of
from tests.zoo import Network
from tests.zoo.dense import UNet
from tests.zoo.several import Detector, ImageAndText

EIGHT = {"w_bits": 8, "a_bits": 8, "preset": "fast", "num_samples": 32}


def _apart(found: Any, wanted: Any) -> float:
    worst = 0.0
    assert names_of(found) == names_of(wanted)
    for mine, other in zip(leaves_of(found), leaves_of(wanted), strict=True):
        assert mine.shape == other.shape
        worst = max(worst, float((mine.float() - other.float()).abs().max() / other.float().abs().max()))
    return worst


def _batches(rows: int = 32) -> list[dict[str, Tensor]]:
    return [ImageAndText.batch(rows // 2, seed) for seed in (1, 2)]


@pytest.mark.parametrize("spelling", ["keywords", "reordered", "positions"])
def test_several_inputs_are_given_as_in_the_calibration(spelling: str) -> None:
    model, given = Network(ImageAndText).build(), _batches()
    if spelling == "reordered":
        given = [dict(reversed(batch.items())) for batch in given]
    calibration = [(tuple(batch.values()),) for batch in given] if spelling == "positions" else given
    quantized, report = quantize(model, QuantSpec(**EIGHT), calibration)
    assert len(report.layers) == 5
    with torch.no_grad():
        for rows in (1, 5):
            batch = ImageAndText.batch(rows, seed=9)
            arguments = {} if spelling == "positions" else batch
            found = quantized(*([] if arguments else batch.values()), **arguments)
            assert type(found) is tuple
            assert _apart(found, model(**batch)) < 0.05


def test_units_are_found_on_both_branches_and_all_stages_train_them() -> None:
    model, given = Network(ImageAndText).build(), _batches(128)
    options = {"w_bits": 3, "a_bits": 4, "first_bits": None, "last_bits": None, "num_samples": 128}
    spec = QuantSpec(
        **options, unit_steps=30, model_steps=20, refinement_steps=10, loss="fisher", guidance=0.1
    )
    _, report = quantize(model, spec, given)
    names = [unit.name for unit in report.units]
    assert names[0] == "stem.0.0"
    assert names[-2:] == ["model", "refinement"]
    assert any(unit.loss_after < unit.loss_before for unit in report.units if unit.kind == "unit")


def test_the_errors_of_the_results_that_are_named_add_up() -> None:
    model, given = Network(ImageAndText).build(), _batches(128)
    # With weights for positions the closed form itself depends on what counts.
    options = {"w_bits": 2, "a_bits": 4, "num_samples": 128, "preset": "fast", "model_steps": 1}
    options["position_weights"] = False
    before = {}
    for counted in ("0", "1", "*"):
        _, report = quantize(model, QuantSpec(**options, outputs=(counted,)), given)
        before[counted] = report.units[-1].loss_before
    assert min(before.values()) > 0
    assert before["*"] == pytest.approx(before["0"] + before["1"], rel=1e-5)


def test_a_dict_of_results_keeps_its_keys_and_what_has_no_row() -> None:
    model = Network(Detector).build()
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    quantized, _ = quantize(model, QuantSpec(**EIGHT), images)
    with torch.no_grad():
        found, wanted = quantized(images[:5]), model(images[:5])
    assert list(found) == ["scores", "boxes", "anchors"]
    assert _apart(found, wanted) < 0.06


@pytest.mark.parametrize(("make", "logits", "axis"), [(UNet, "output", 1), (Detector, "scores", -1)])
def test_logits_of_pixels_and_places_are_trained_by_their_divergence(
    make: Any, logits: str, axis: int
) -> None:
    model = Network(make).build()
    images = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"w_bits": 2, "a_bits": 4, "preset": "fast", "model_steps": 20, "num_samples": 128}
    options |= {"bias_correction": False, "compensation": False}  # or training finds nothing to do
    spec = QuantSpec(**options, outputs=(logits,), logits=logits, class_axis=axis)
    _, report = quantize(model, spec, images)
    assert report.units[-1].loss_after < 0.9 * report.units[-1].loss_before
    found = sensitivity(model, spec, images[:16])
    assert any(each.changed > 0 for each in found)


@dataclass
class _Scores:
    logits: Tensor
    box: Tensor


class _InClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc, self.box = nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> _Scores:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return _Scores(self.fc(x), self.box(x))


def test_a_data_class_that_the_exporter_does_not_know_comes_back_as_a_dict() -> None:
    images = torch.randn(32, 3, 8, 8)
    model = _InClasses().eval()
    quantized, _ = quantize(model, QuantSpec(**EIGHT, logits="logits"), images)
    found = quantized(images[:3])
    assert type(found) is dict
    assert list(found) == ["logits", "box"]
    assert _apart(found, model(images[:3])) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ("score",)}, r"no output 'score'.*'scores'"),
        ({"logits": "anchors"}, "no output 'anchors'"),
        ({"logits": "scores", "class_axis": 3}, "class_axis=3 is no axis of classes"),
        ({"logits": "scores", "class_axis": 0}, "class_axis=0 is no axis of classes"),
    ],
)
def test_results_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(Network(Detector).build(), QuantSpec(**EIGHT, **options), torch.randn(8, 3, 16, 16))


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    model, (first, second) = Network(ImageAndText).build(), _batches()
    with pytest.raises(CalibrationError, match="expected a row for each sample in every tensor"):
        quantize(model, QuantSpec(**EIGHT), [{**first, "mask": first["mask"][:3]}])
    with pytest.raises(CalibrationError, match="expected the same arguments in every batch"):
        quantize(model, QuantSpec(**EIGHT), [first, (tuple(second.values()),)])
