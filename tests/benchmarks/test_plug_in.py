"""Logits that another library's quantizer has distorted are corrected, and the row says by how much."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import plug_in
from benchmarks.models import Split
from benchmarks.peers import common

CLASSES, ROWS = 10, 600


def full(x: torch.Tensor) -> torch.Tensor:
    return 3.0 * x


def quantized(x: torch.Tensor) -> torch.Tensor:
    z = full(x)
    z[:, 0] += 4.0  # one class wins far too often
    return z


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    inputs = torch.randn(2 * ROWS, CLASSES, generator=torch.manual_seed(0))
    labels = full(inputs).argmax(1)
    whole = Split(inputs[:ROWS], labels[:ROWS], inputs[ROWS:], labels[ROWS:])
    monkeypatch.setattr(common, "split_of", lambda *_, **__: whole)
    monkeypatch.setitem(common.MODELS, "network", lambda _: torch.nn.Module())
    monkeypatch.setattr(torch.nn.Module, "forward", lambda _, x: full(x), raising=False)
    return Namespace(data=None, logits=tmp_path / "logits", split=whole)


def test_the_correction_of_stored_logits_is_counted_on_evaluation_rows(
    options: Namespace, tmp_path: Path
) -> None:
    split = Split(
        options.split.calibration[:200],
        options.split.calibration_labels[:200],
        *[*vars(options.split).values()][2:],
    )
    row = {"peer": "other", "model": "network", "w_bits": 4, "a_bits": 8, "method": "a method / another"}
    common.score(row, quantized, split, options)
    (file,) = options.logits.iterdir()
    measured = plug_in.measure(file)
    expected = 100.0 * float(
        (quantized(split.evaluation).argmax(1) == split.evaluation_labels).float().mean()
    )
    assert row["top1"] == pytest.approx(expected, abs=1e-3)
    assert "top1_ten" not in row
    assert measured["quantized"] == pytest.approx(expected, abs=0.01)
    assert (measured["calibration"], measured["fitted_to"], measured["bits"]) == (200, ROWS, "W4A8")
    assert {k: measured[k] for k in ("peer", "model", "method")} == {
        k: row[k] for k in ("peer", "model", "method")
    }
    assert measured["auto"] > 97.0 > 80.0 > measured["quantized"]  # a bias is all that is to be learned
    assert measured["paper"] > measured["quantized"]


def test_logits_are_stored_only_where_they_are_asked_for(options: Namespace) -> None:
    options.logits = None
    row = {"peer": "other", "model": "network", "w_bits": 4, "a_bits": 8, "method": "m"}
    common.score(row, quantized, options.split, options)
    assert "top1" in row


def test_a_folder_without_logits_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["plug_in", "--logits", str(tmp_path), "--out", str(tmp_path / "out.json")]
    )
    with pytest.raises(SystemExit):
        plug_in.main()
    assert "no logits in" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_rows_are_merged_into_the_table(
    options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"peer": "other", "model": "network", "w_bits": 8, "a_bits": 8, "method": "m"}
    common.score(row, quantized, options.split, options)
    monkeypatch.setattr(
        "sys.argv", ["plug_in", "--logits", str(options.logits), "--out", str(tmp_path / "out.json")]
    )
    plug_in.main()
    (written,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert written["peer"] == "other"
    assert np.isfinite(written["auto"])
