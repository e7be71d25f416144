"""Interrupted runs go on to the same bits; a checkpoint that cannot be used is refused."""

from __future__ import annotations

import json

import pytest

from cat_plugin import files
from cat_plugin.errors import QuantizationError
from cat_plugin.ptq import QuantSpec, checkpoint, quantize
from cat_plugin.ptq.checkpoint import Checkpoint
from tests.ptq.models import SmallResNet, assert_same, randomise, small_inputs

_TRAINED = {"unit_steps": 6, "model_steps": 4, "refinement_steps": 3, "batch_size": 8}


# With as many bits for residuals as for activations, a shortcut reads the quantizer of the layer that it goes around.
@pytest.mark.parametrize(("unit", "residual_bits"), [("layer", 8), ("layer", 3), ("block", 8), ("pack", 8)])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, unit, residual_bits):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    bits = {"w_bits": 2, "a_bits": 3, "first_bits": 4, "residual_bits": residual_bits}
    spec = QuantSpec(**bits, preset="best", unit=unit, **_TRAINED)
    whole, report = quantize(model, spec, x)

    class Stop(Exception):
        pass

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


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    quantize(model, QuantSpec(preset="balanced", **_TRAINED), x, resume=tmp_path)
    with pytest.raises(QuantizationError, match="another"):
        quantize(model, QuantSpec(preset="balanced", w_bits=3, **_TRAINED), x, resume=tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(QuantizationError, match="delete the directory to start anew"):
        quantize(model, QuantSpec(preset="balanced", **_TRAINED), x, resume=tmp_path)


def test_one_run_at_a_time_in_a_directory(tmp_path):
    first = Checkpoint(tmp_path, "key")
    with pytest.raises(QuantizationError, match="another run is at work"):
        Checkpoint(tmp_path, "key")
    first.close()
    Checkpoint(tmp_path, "key").close()


@pytest.mark.parametrize("written", [True, False])
def test_a_save_interrupted_anywhere_leaves_a_whole_state(tmp_path, monkeypatch, written):
    """Ctrl-C just before or just after the state is put in place: either way it has its tensors."""
    module = quantize(randomise(SmallResNet()), QuantSpec(preset="fast"), small_inputs(24, 3, 12, 12))[0]
    first = Checkpoint(tmp_path, "key")
    first.save(module, "one")

    def interrupted(path, text):
        if written:
            files.write_text(path, text)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.save(module, "two")
    first.close()
    monkeypatch.undo()
    again = Checkpoint(tmp_path, "key")
    assert again.finished == (["one", "two"] if written else ["one"])
    again.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    spec = QuantSpec(preset="balanced", **_TRAINED)
    quantize(model, spec, x, resume=tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(QuantizationError, match="does not match the sha256"):
        quantize(model, spec, x, resume=tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    for change in ({"tensors": None}, {"finished": 3}, {"records": [1]}, {"file": {}}):
        (tmp_path / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(QuantizationError, match="delete the directory"):
            quantize(model, spec, x, resume=tmp_path)
