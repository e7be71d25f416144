"""Metrics against scikit-learn, and functions of the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, top_k_accuracy_score

from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.report.metrics import load_metric, macro_f1, miou, top1, top5


def drawn(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(shape[0], 9, *shape[1:]))
    return logits, draw.integers(0, 9, shape)


def test_classification() -> None:
    logits, labels = drawn(200)
    assert top1(logits, labels) == pytest.approx((logits.argmax(1) == labels).mean())
    assert top5(logits, labels) == pytest.approx(
        top_k_accuracy_score(labels, logits, k=5, labels=np.arange(9))
    )
    assert macro_f1(logits, labels) == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))


def test_segmentation_leaves_out_what_is_not_labelled() -> None:
    logits, labels = drawn(4, 6, 5)
    labels[0] = 255
    expected = jaccard_score(labels[1:].ravel(), logits[1:].argmax(1).ravel(), average="macro")
    assert miou(logits, labels) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [top1, top5, macro_f1, miou])
def test_labels_of_another_shape_are_told(metric: object) -> None:
    """Numpy would stretch them and return a number."""
    logits, _ = drawn(4)
    assert callable(metric)
    with pytest.raises(CATValueError, match="expected labels of shape"):
        metric(logits, np.zeros((4, 1), int))


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymetrics.py").write_text(
        "def best(logits, labels): return logits.max()\ndef words(logits, labels): return 'good'\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_metric("mymetrics:best")(np.array([[1.0, 7.0]]), np.array([0])) == 7
    with pytest.raises(CATTypeError, match="returned a str"):
        load_metric("mymetrics:words")(np.zeros((1, 2)), np.array([0]))
    with pytest.raises(CATTypeError, match="expected a function"):
        load_metric("mymetrics:number")
    for name, message in (
        ("top2", "is none of"),
        ("mymetrics:none", "cannot be used"),
        ("no_such:x", "cannot be used"),
    ):
        with pytest.raises(CATValueError, match=message):
            load_metric(name)
