"""How images become inputs, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cat_plugin.errors import CATValueError
from cat_plugin.graph.preparation import Preparation, are_class_names, is_preparation, preparation_of

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_inputs_and_back_again(order: str) -> None:
    how = Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), channel_order=order)
    inputs = how.apply(IMAGES)
    assert inputs.dtype == np.float32
    planes = IMAGES[..., ::-1] if order == "BGR" else IMAGES
    wanted = (planes / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(inputs, wanted.transpose(0, 3, 1, 2), atol=1e-6)
    np.testing.assert_allclose(how.restore(inputs), IMAGES.transpose(0, 3, 1, 2) / 255.0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": (0.0, 0.0, 0.0)}, "numbers above 0"),
        ({"std": (1.0, -1.0, 1.0)}, "numbers above 0"),
        ({"mean": (float("nan"),)}, "a finite number for each channel"),
        ({"mean": ()}, "a finite number for each channel"),
        ({"mean": (0.1,), "std": (0.1, 0.2, 0.3)}, "mean has 1 values and std 3"),
        ({"image_size": 0}, "image_size is 0"),
        ({"channel_order": "GBR"}, "expected RGB or BGR"),
        ({"source": "sound"}, "expected images or arrays"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CATValueError, match=message):
        Preparation(**fields)  # type: ignore[arg-type]


def test_one_value_does_not_stand_for_three_channels() -> None:
    with pytest.raises(CATValueError, match="mean has 1 values for data of shape"):
        Preparation(mean=(0.5,)).apply(IMAGES)
    with pytest.raises(CATValueError, match="BGR is for images of three channels"):
        Preparation(channel_order="BGR").apply(IMAGES[..., :1])


def test_json_and_back() -> None:
    how = Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), image_size=32, channel_order="BGR")
    read = json.loads(json.dumps(how.to_dict()))
    assert preparation_of({"preparation": read, "calibration": {}}) == how
    assert preparation_of({"calibration": {"preparation": {"mean": [0.5], "std": [0.2]}}}) == Preparation(
        mean=(0.5,), std=(0.2,)
    )
    assert preparation_of({}) is None
    assert preparation_of({"calibration": {"preparation": {}}}) is None


@pytest.mark.parametrize(
    "wrong", [[], "x", {"mean": "12"}, {"mean": [True]}, {"std": [0]}, {"image_size": True}, {"source": []}]
)
def test_json_of_another_form_is_found_out(wrong: object) -> None:
    assert not is_preparation(wrong)
    assert is_preparation(None)


def test_class_names_are_a_list_of_text() -> None:
    assert are_class_names(["a", "b"])
    assert are_class_names(None)
    assert not are_class_names("ab")
    assert not are_class_names([1])
