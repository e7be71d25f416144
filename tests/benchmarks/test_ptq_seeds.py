"""Rows of the accuracy benchmark with several seeds."""

from __future__ import annotations

import json

import pytest

from benchmarks import ptq_accuracy, ptq_seeds


def measured(top1, kl):
    row = {"model": "resnet20", "w_bits": 2, "a_bits": 4, "convention": "strict", "preset": "fast"}
    return {
        **row,
        "calibration": 1024,
        "fp_top1": 86.5,
        "top1": top1,
        "held_out_kl": kl,
        "held_out_agreement": 90.0,
    }


def test_the_mean_and_the_deviation_of_every_number():
    row = ptq_seeds.spread("resnet20/w2a4/strict/fast", [measured(84.5, 0.1), measured(84.0, 0.3)])
    assert row["bits"] == "W2A4"
    assert (row["seeds"], row["inputs"]) == (2, 1024)
    assert row["drop"] == pytest.approx(2.25)
    assert row["drop_sd"] == pytest.approx(0.125**0.5, abs=1e-4)
    assert row["held_out_kl"] == pytest.approx(0.2)
    assert row["held_out_agreement_sd"] == 0.0


def test_each_row_is_measured_with_every_seed_and_merged(monkeypatch, tmp_path, capsys):
    seen = []

    def measure(name, data, threads, seed, samples):
        seen.append((name, seed, samples))
        return measured(84.0 + seed, 0.1)

    monkeypatch.setattr(ptq_accuracy, "measure", measure)
    out = tmp_path / "seeds.json"
    ptq_seeds.main(["--rows", "resnet20/w2a2/*/fast", "--seeds", "3", "--out", str(out)])
    names = ["resnet20/w2a2/default/fast", "resnet20/w2a2/strict/fast"]
    assert seen == [(name, seed, None) for name in names for seed in range(3)]
    assert [row["row"] for row in json.loads(out.read_text())["rows"]] == names
    assert "lost 1.50 (1.00)" in capsys.readouterr().out
    ptq_seeds.main(["--rows", names[0], "--seeds", "2", "--samples", "3072", "--out", str(out)])
    assert seen[-1] == (names[0], 1, 3072)
    assert [row["row"] for row in json.loads(out.read_text())["rows"]] == [*names, f"{names[0]}/3072"]


def test_one_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        ptq_seeds.main(["--seeds", "1"])
    assert "one seed has no spread" in capsys.readouterr().err
