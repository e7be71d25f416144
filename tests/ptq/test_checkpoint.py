"""Interrupted runs go on to the same bits; a checkpoint that cannot be used is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from cat_plugin import files
from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, checkpoint, quantize
from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.closed_form.sequence import SequentialFit
from tests.ptq.models import Attention, SmallResNet, assert_same, randomise, small_inputs

_TRAINED = {"unit_steps": 6, "model_steps": 4, "refinement_steps": 3, "batch_size": 8}


class Stop(Exception):
    """A run is interrupted."""


# With as many bits for residuals as for activations, a shortcut reads the quantizer of the layer that it goes around.
@pytest.mark.parametrize(("unit", "residual_bits"), [("layer", 8), ("layer", 3), ("block", 8), ("pack", 8)])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, unit, residual_bits):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    bits = {"w_bits": 2, "a_bits": 3, "first_bits": 4, "residual_bits": residual_bits}
    spec = QuantSpec(**bits, preset="best", unit=unit, **_TRAINED)
    whole, report = quantize(model, spec, x)
    seen = []

    def stop(event):
        if event.loss_after is not None:
            seen.append(event.stage)
            if len(seen) == 2:
                raise Stop

    with pytest.raises(Stop):
        quantize(model, spec, x, progress=stop, resume=tmp_path / "state")
    finished = json.loads((tmp_path / "state" / "state.json").read_text())["finished"]
    assert finished
    again = []
    resumed, second = quantize(
        model,
        spec,
        x,
        resume=tmp_path / "state",
        progress=lambda e: e.loss_after is not None and again.append(e),
    )
    assert_same(whole, resumed)
    assert not {f"unit {e.stage}" for e in again} & set(finished)
    assert [layer.name for layer in second.layers] == [layer.name for layer in report.layers]
    assert [u.loss_after for u in second.units] == [u.loss_after for u in report.units]
    third, _ = quantize(model, spec, x, resume=tmp_path / "state")
    assert_same(whole, third)


_BITS_BY_BUDGET = QuantSpec(preset="fast", a_bits=4, weight_budget=3.0)
_SMOOTHED = QuantSpec(
    w_bits=3, a_bits=4, preset="fast", smoothing="lrquant", smoothing_epochs=2, batch_size=8
)


@pytest.mark.parametrize(
    ("network", "shape", "spec"),
    [(SmallResNet, (24, 3, 12, 12), _BITS_BY_BUDGET), (Attention, (24, 3, 16, 16), _SMOOTHED)],
    ids=["closed form", "smoothing"],
)
def test_every_step_is_kept_whatever_the_preset(tmp_path, caplog, network, shape, spec):
    """Interrupted behind each step in turn: the next run does only what is left, and says where it goes on."""
    model, x = randomise(network()), small_inputs(*shape)
    whole, report = quantize(model, spec, x)
    finished, rounds = [], 0
    while "complete" not in finished:
        rounds += 1
        assert rounds < 20

        def stop(event, before=tuple(finished)):
            on_disk = tmp_path / "state.json"
            if on_disk.exists() and json.loads(on_disk.read_text())["finished"] != list(before):
                raise Stop

        caplog.clear()
        with caplog.at_level("INFO", "cat_plugin"), contextlib.suppress(Stop):
            quantize(model, spec, x, progress=stop, resume=tmp_path)
        if finished:
            assert f"{len(finished)} step" in caplog.text
            assert repr(finished[-1]) in caplog.text
        before, finished = finished, json.loads((tmp_path / "state.json").read_text())["finished"]
        assert finished[: len(before)] == before
        assert len(finished) > len(before)
    assert rounds > 2
    resumed, second = quantize(model, spec, x, resume=tmp_path)
    assert_same(whole, resumed)
    assert second.layers == report.layers
    assert second.notes == report.notes
    assert second.units == report.units


def test_a_complete_run_is_taken_over_without_a_pass_over_the_data(tmp_path, caplog, monkeypatch):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    first, _ = quantize(model, QuantSpec(preset="fast"), x, resume=tmp_path)
    monkeypatch.setattr(SequentialFit, "run", lambda *_: pytest.fail("it was fitted again"))
    with caplog.at_level("INFO", "cat_plugin"):
        again, _ = quantize(model, QuantSpec(preset="fast"), x, resume=tmp_path)
    assert_same(first, again)
    assert "holds this quantization complete" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    quantize(model, QuantSpec(preset="balanced", **_TRAINED), x, resume=tmp_path)
    with pytest.raises(QuantizationError, match="another"):
        quantize(model, QuantSpec(preset="balanced", w_bits=3, **_TRAINED), x, resume=tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(QuantizationError, match="delete the directory to start anew"):
        quantize(model, QuantSpec(preset="balanced", **_TRAINED), x, resume=tmp_path)


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    """A state from before softmax levels were fitted had not what the code behind it looked for."""
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    quantize(model, QuantSpec(preset="fast"), x, resume=tmp_path)
    monkeypatch.setattr(checkpoint, "__version__", "0.0.1")
    with pytest.raises(QuantizationError, match="another model, specification, calibration set or version"):
        quantize(model, QuantSpec(preset="fast"), x, resume=tmp_path)


def test_every_source_of_the_engine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    deep = tmp_path / "quantizers" / "tables.py"
    deep.parent.mkdir()
    found = set()
    for text in ("levels", "levels and borders"):
        deep.write_text(text)
        found.add(checkpoint.code_of_engine())
    assert len(found) == 2


def test_one_run_at_a_time_in_a_directory(tmp_path):
    first = Checkpoint(tmp_path, "key")
    with pytest.raises(QuantizationError, match="another run is at work"):
        Checkpoint(tmp_path, "key")
    first.close()
    Checkpoint(tmp_path, "key").close()


@pytest.mark.parametrize("written", [True, False])
def test_a_save_interrupted_anywhere_leaves_a_whole_state(tmp_path, monkeypatch, written):
    """Ctrl-C just before or just after the state is put in place: either way it has its tensors."""
    first = Checkpoint(tmp_path, "key")
    first.save("one", {"a": torch.ones(3)}, {})

    def interrupted(path, text):
        if written:
            files.write_text(path, text)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.save("two", {"a": torch.zeros(3)}, {})
    first.close()
    monkeypatch.undo()
    again = Checkpoint(tmp_path, "key")
    assert again.finished == (["one", "two"] if written else ["one"])
    again.close()
    assert again.tensors["a"].tolist() == [float(not written)] * 3
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_what_was_half_written_when_the_run_was_killed_is_swept_away(tmp_path, monkeypatch):
    """Wherever the library that writes the tensors begins: beside the file that it is asked for, whatever the name."""
    first = Checkpoint(tmp_path, "key")
    first.save("one", {"a": torch.ones(3)}, {})

    def killed(tensors, path):
        (path.parent / ".tmpA1b2C3").write_bytes(b"half")
        raise SystemExit

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(SystemExit):
        first.save("two", {"a": torch.zeros(3)}, {})
    first.close()
    Checkpoint(tmp_path, "key").close()
    assert {path.name for path in tmp_path.iterdir()} == {"state.json", "state_1.safetensors"}


def test_a_step_writes_what_it_made_and_nothing_else(tmp_path):
    first = Checkpoint(tmp_path, "key", {"bits": 4})
    first.save("one", {"a": torch.ones(3), "b": torch.ones(1)}, {})
    first.save("two", {"b": torch.zeros(1), "c": torch.ones(2)}, {"units": [1]})
    first.save("three", {}, {"units": [1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state.json", "state_1.safetensors", "state_2.safetensors"
    ]  # fmt: skip
    first.close()
    again = Checkpoint(tmp_path, "key")
    assert again.finished == ["one", "two", "three"]
    assert again.records == {"units": [1]}
    assert {name: value.tolist() for name, value in again.tensors.items()} == {
        "a": [1, 1, 1], "b": [0], "c": [1, 1]
    }  # fmt: skip
    again.save("four", {"a": torch.ones(3), "b": torch.ones(1)}, {})
    again.close()
    # The first file said nothing more that still counts.
    assert not (tmp_path / "state_1.safetensors").exists()
    assert json.loads((tmp_path / "state.json").read_text())["about"] == {}


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    spec = QuantSpec(preset="balanced", **_TRAINED)
    quantize(model, spec, x, resume=tmp_path)
    *_, tensors = tmp_path.glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(QuantizationError, match="does not match the sha256"):
        quantize(model, spec, x, resume=tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    for change in ({"files": None}, {"files": {"a": 1}}, {"finished": 3}, {"records": [1]}, {"file": {}}):
        (tmp_path / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(QuantizationError, match="delete the directory"):
            quantize(model, spec, x, resume=tmp_path)
