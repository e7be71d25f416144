"""The rows that a library is checked by: written with a bundle, read without torch, damage refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cat_plugin.errors import BundleError
from cat_plugin.graph.bundle import export_bundle, read_bundle
from cat_plugin.graph.checks import Checks, Run
from cat_plugin.graph.export import export_program
from cat_plugin.graph.sampling import make_checks


class Net(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def checks(outputs: np.ndarray[Any, Any]) -> Checks:
    return Checks((Run((np.zeros((5, 2), np.float32),), (outputs,)),), typical=1e-3, worst=0.1)


def test_rows_and_outputs_are_stored_at_two_batch_sizes(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(8, 3)
    found = read_bundle(export_bundle(Net(), x, tmp_path / "b")).checks()
    assert found is not None
    assert [len(run) for run in found.runs] == [1, 5]
    np.testing.assert_array_equal(found.runs[1].inputs[0], x[:5])
    np.testing.assert_array_equal(found.runs[1].outputs[0], 2 * x[:5])
    assert found.fault(lambda rows: rows * 2) is None


def test_fewer_rows_are_completed_and_large_ones_are_few() -> None:
    small = make_checks(export_program(Net(), torch.randn(2, 3)), torch.randn(2, 3))
    assert len({row.tobytes() for row in small.runs[1].inputs[0]}) == 5
    large = torch.randn(3, 200_000)
    assert [len(run) for run in make_checks(export_program(Net(), large), large).runs] == [1, 2]


def test_none_are_stored_where_they_are_not_wanted_or_the_bundle_is_older(tmp_path: Path) -> None:
    bundle = export_bundle(Net(), torch.randn(2, 3), tmp_path / "b", checks=False)
    assert sorted(path.name for path in bundle.iterdir()) == ["manifest.json", "model.pt2"]
    assert read_bundle(bundle).checks() is None


class Centred(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def test_rows_that_depend_on_each_other_are_found_out() -> None:
    x = torch.randn(6, 3)
    assert make_checks(export_program(Net(), x), x).rows_are_independent()
    assert not make_checks(export_program(Centred(), x), x).rows_are_independent()
    assert not checks(np.ones((5, 3), np.float32)).rows_are_independent()  # one run tells nothing


@pytest.mark.parametrize("content", [b"", b"\0" * 40, None])
def test_a_file_of_something_else_is_refused(content: bytes | None) -> None:
    if content is None:
        content = checks(np.ones((5, 3), np.float32)).to_bytes().replace(b"cat-checks 1", b"cat-checks 2")
    with pytest.raises(BundleError, match="is no file of inputs and outputs"):
        Checks.read(io.BytesIO(content), Path("checks.safetensors"), BundleError, "")


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    bundle = export_bundle(Net(), torch.randn(2, 3), tmp_path / "b")
    path = bundle / "checks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match="does not match the sha256"):
        read_bundle(bundle)
    assert "checks.safetensors" in json.loads((bundle / "manifest.json").read_text())["files"]


def test_one_row_may_be_off_by_the_worst_and_the_median_by_rounding_only() -> None:
    outputs = np.ones((5, 3), np.float32)
    kept = checks(outputs)
    one, all_of_them = outputs.copy(), outputs + 0.01
    one[2, 1] += 0.05
    assert kept.fault(lambda _: one) is None
    assert "rows 0 (0.01)" in str(kept.fault(lambda _: all_of_them))
    one[2, 1] += 0.1
    assert "rows 2 (0.15) of 5" in str(kept.fault(lambda _: one))
    one[2, 1] = np.nan
    assert "rows 2 (inf)" in str(kept.fault(lambda _: one))
    assert "expected [(5, 3)]" in str(kept.fault(lambda _: one[:4]))
