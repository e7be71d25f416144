"""Packs, bit-widths under a budget, presets, caching, resuming, progress."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.memory import STATUS, PeakMemory
from cat_plugin import files
from cat_plugin.errors import CATValueError, QuantizationError
from cat_plugin.ptq import QuantSpec, checkpoint, quantize
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.checkpoint import Checkpoint
from cat_plugin.ptq.closed_form.mixed_precision import choose_bits
from cat_plugin.ptq.graph.executor import Executor, last_uses
from cat_plugin.ptq.graph.ops import is_batched
from cat_plugin.ptq.graph.packs import group_by_score
from cat_plugin.ptq.graph.trace import trace
from cat_plugin.ptq.presets import plan
from tests.ptq.models import SmallResNet, randomise, small_inputs

_TRAINED = {"unit_steps": 6, "model_steps": 4, "refinement_steps": 3, "batch_size": 8}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9))
@settings(deadline=None)
def test_packs_start_at_the_lowest_score_of_what_is_left_in_front(scores):
    packs = group_by_score(scores)
    assert [i for start, end in packs for i in range(start, end)] == list(range(len(scores)))
    for start, end in packs:
        assert scores[start] == min(scores[:end])


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.floats(0, 5), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.floats(2.0, 8.0),
)
@settings(deadline=None, max_examples=60)
def test_chosen_bits_are_the_cheapest_within_the_budget(units, budget):
    sizes, costs = [u[0] for u in units], [u[1] for u in units]
    candidates = [2, 4, 8]
    chosen = choose_bits(costs, sizes, candidates, budget)
    total = sum(sizes)

    def cost(bits):
        return sum(c[candidates.index(b)] for c, b in zip(costs, bits, strict=True))

    def mean(bits):
        return sum(b * s for b, s in zip(bits, sizes, strict=True)) / total

    assert mean(chosen) <= budget + 1e-6
    options = itertools.product(candidates, repeat=len(units))
    best = min(cost(bits) for bits in options if mean(bits) <= budget + 1e-12)
    assert cost(chosen) == pytest.approx(best, abs=1e-9)


def test_a_budget_below_the_smallest_width_is_refused():
    with pytest.raises(CATValueError, match="budget"):
        choose_bits([[1.0, 0.0]], [10], [4, 8], 3.0)


def test_mixed_precision_keeps_the_budget_and_the_fixed_layers():
    model, x = randomise(SmallResNet()), small_inputs(32, 3, 12, 12)
    spec = QuantSpec(w_bits=4, a_bits=8, preset="fast", weight_budget=3.5, batch_size=8)
    _, report = quantize(model, spec, x)
    free = [layer for layer in report.layers if layer.name not in ("stem.0", "fc")]
    counts = [torch.Size(layer.weight_shape).numel() for layer in free]
    mean = sum(layer.w_bits * n for layer, n in zip(free, counts, strict=True)) / sum(counts)
    assert mean <= 3.5
    assert report.layers[0].w_bits == report.layers[-1].w_bits == 8
    assert any("mixed precision" in note for note in report.notes)


def test_presets_name_the_stages():
    fast, balanced, best = (plan(QuantSpec(preset=p)) for p in ("fast", "balanced", "best"))
    assert (fast.unit_steps, fast.model_steps, fast.refinement_steps) == (0, 0, 0)
    assert best.unit_steps >= balanced.unit_steps > 0
    assert best.model_steps > balanced.model_steps == 0
    assert plan(QuantSpec(preset="best", unit_steps=7)).unit_steps == 7
    frozen = plan(QuantSpec(preset="best", rounding="none", learned_steps=False))
    assert frozen.unit_steps == 0
    _, report = quantize(
        randomise(SmallResNet()), QuantSpec(preset="fast", batch_size=8), small_inputs(16, 3, 12, 12)
    )
    assert report.units == []


def _same(a, b):
    assert a.code == b.code
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


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
    _same(whole, resumed)
    assert not {f"unit {e.stage}" for e in again} & set(finished)
    assert [layer.name for layer in second.layers] == [layer.name for layer in report.layers]
    assert [u.loss_after for u in second.units] == [u.loss_after for u in report.units]
    third, _ = quantize(model, spec, x, resume=tmp_path / "state")
    _same(whole, third)


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


def test_a_memory_budget_bounds_the_cache_and_changes_nothing():
    model, x = randomise(SmallResNet()), small_inputs(256, 3, 24, 24)
    options = {"w_bits": 2, "a_bits": 2, "preset": "balanced", "unit_steps": 4, "refinement_steps": 0}
    free, unbounded = quantize(model, QuantSpec(**options), x)
    bound, report = quantize(model, QuantSpec(memory_mb=3, **options), x)
    _same(free, bound)
    assert unbounded.cache["file_bytes"] == 0
    assert unbounded.cache["peak_bytes"] > 3 << 20
    assert report.cache["file_bytes"] > 0
    assert report.cache["peak_bytes"] <= 3 << 20


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_a_memory_budget_bounds_what_the_process_takes():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))

    model, x = randomise(Wide()), small_inputs(256, 3, 64, 64)  # 64 MiB an activation
    options = {"w_bits": 4, "a_bits": 4, "preset": "fast", "batch_size": 4}
    quantize(model, QuantSpec(**options), x[:8])  # what is loaded once
    with PeakMemory() as free:
        first, unbounded = quantize(model, QuantSpec(**options), x)
    with PeakMemory() as tight:
        second, bounded = quantize(model, QuantSpec(memory_mb=8, **options), x)
    _same(first, second)
    assert bounded.cache["peak_bytes"] <= 8 << 20
    assert unbounded.cache["peak_bytes"] >= 128 << 20
    grown = tight.anonymous - tight.before
    assert grown < (free.anonymous - free.before) / 2
    assert grown < (8 + 12 + 48) << 20  # the budget, a copy of the inputs, single batches


def test_a_chain_of_activations_takes_one_tensor():
    class Chain(nn.Module):
        def forward(self, x):
            y = torch.relu(x + 1.0)
            return torch.sigmoid(torch.tanh(y)) * y

    x = small_inputs(6, 3, 4, 4)
    module = trace(Chain(), x)
    uses = last_uses(module.graph, {})
    with TensorStore() as store:
        executor = Executor(module, x, 2, store, lambda child, value: child(value))
        for node in module.graph.nodes:
            executor.run(node, uses.get(node, []))
            executor.drop(uses.get(node, []))
            result = node
            if is_batched(node) and node.op == "call_function":
                last = executor.values[node].clone()
        assert result.op == "output"
        assert store.peak == 2 * x.numel() * 4  # y, and one of the others at a time
    assert torch.equal(last, Chain()(x))
    assert torch.equal(x, small_inputs(6, 3, 4, 4))


def test_the_store_counts_what_it_holds():
    with TensorStore(1000) as store:
        small = store.allocate((100,), torch.float32, torch.device("cpu"))
        large = store.allocate((200,), torch.float32, torch.device("cpu"))
        large[:] = 3.0
        assert (store.in_memory, store.on_disk) == (400, 800)
        store.release(small)
        assert store.in_memory == 0
        again = store.allocate((200,), torch.float32, torch.device("cpu"))
        assert (store.in_memory, store.peak) == (800, 800)
        assert float(large.sum()) == 600.0
        assert again.shape == (200,)


def test_progress_counts_up_to_one_and_names_the_units():
    model, x = randomise(SmallResNet()), small_inputs(24, 3, 12, 12)
    events = []
    quantize(model, QuantSpec(w_bits=2, a_bits=2, preset="best", **_TRAINED), x, progress=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] <= 1.0
    finished = [event.stage for event in events if event.loss_after is not None]
    assert finished == ["block1", "block2", "model", "refinement"]
    assert all(event.seconds_left is None or event.seconds_left >= 0 for event in events)
