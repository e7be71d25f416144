"""What is recorded of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from cat_plugin.report.record import label_changes


def test_label_changes() -> None:
    labels = np.array([0, 1, 2])
    said: dict[str, Any] = {"quantized": np.array([0, 0, 2]), "corrected": np.array([0, 1, 2])}
    found = label_changes(labels, said, "x.npz", names=["a", "b", "c"])
    assert found["correct"] == {"quantized": 2, "corrected": 3}
    assert found["rows"] == [[1, 1, 0, 1]]
    assert found["names"] == {"1": "b"}
    assert found["changes"] == {"quantized corrected": [1, 0, 0]}
