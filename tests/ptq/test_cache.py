"""Cached activations within a memory budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.memory import STATUS, PeakMemory
from cat_plugin.errors import CalibrationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.calibration import gather_inputs
from tests.ptq.models import SmallResNet, assert_same, randomise, small_inputs


def test_a_memory_budget_bounds_the_cache_and_changes_nothing():
    model, x = randomise(SmallResNet()), small_inputs(256, 3, 24, 24)
    options = {"w_bits": 2, "a_bits": 2, "preset": "balanced", "unit_steps": 4, "refinement_steps": 0}
    free, unbounded = quantize(model, QuantSpec(**options), x)
    bound, report = quantize(model, QuantSpec(memory_mb=3, **options), x)
    assert_same(free, bound)
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
    assert_same(first, second)
    assert bounded.cache["peak_bytes"] <= 8 << 20
    assert unbounded.cache["peak_bytes"] >= 128 << 20
    grown = tight.anonymous - tight.before
    assert grown < (free.anonymous - free.before) / 2
    assert grown < (8 + 12 + 48) << 20  # the budget, a copy of the inputs, single batches


def test_inputs_that_come_one_by_one_are_not_held(tmp_path):
    """Batches of a generator go to the store as they come; portions of one tensor stay a view of it."""
    x = small_inputs(64, 3, 16, 16)
    with TensorStore(1000) as store:
        made = (x[start : start + 8].clone() for start in range(0, 64, 8))
        gathered = gather_inputs(made, 60, store)
        assert torch.equal(gathered.tensors[0], x[:60])
        assert store.in_memory == 0
        written = store.on_disk
        assert 60 * 3 * 16 * 16 * 4 <= written <= 2 * 64 * 3 * 16 * 16 * 4
        view = gather_inputs(x.split(8), 60, store)
        assert view.tensors[0].data_ptr() == x.data_ptr()
        assert len(view) == 60
        assert store.on_disk == written
        short = gather_inputs([x[:8].clone(), x[8:10].clone()], 60, store)
        assert torch.equal(short.tensors[0], x[:10])


def test_what_is_settled_is_still_there():
    with TensorStore(0) as store:
        tensor = store.allocate((1 << 20,), torch.float32, torch.device("cpu"))
        tensor.copy_(torch.arange(1 << 20))
        store.settle()
        assert torch.equal(tensor, torch.arange(1 << 20, dtype=torch.float32))


@pytest.mark.parametrize("memory_mb", [None, 1])
def test_the_peak_is_foreseen(caplog, memory_mb):
    model, x = randomise(SmallResNet()), small_inputs(256, 3, 24, 24)
    stages = []
    spec = QuantSpec(preset="fast", memory_mb=memory_mb)
    with caplog.at_level("INFO", "cat_plugin"):
        _, report = quantize(model, spec, x, progress=lambda event: stages.append(event.stage))
    (line,) = [text for text in caplog.messages if "fitting the units takes" in text]
    (told,) = [stage for stage in stages if stage.startswith("units, about")]
    assert told.removeprefix("units, ") in line
    assert ("of files" in line) == (memory_mb is not None)
    if memory_mb is None:
        foreseen = int(line.partition("about ")[2].partition(" MiB")[0]) << 20
        assert report.cache["peak_bytes"] / 2 < foreseen < 4 * report.cache["peak_bytes"]


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


def test_what_is_reserved_is_not_allocated():
    with TensorStore(1000) as store:
        store.reserve(700)
        store.allocate((100,), torch.float32, torch.device("cpu"))
        assert (store.in_memory, store.on_disk) == (0, 400)
        store.reserve(5000)
        assert store.reserved == 1000
        store.trim()


def test_passes_that_would_take_too_much_change_no_more_than_rounding(monkeypatch):
    model, x = randomise(SmallResNet()), small_inputs(64, 3, 24, 24)
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", compensation=False, refit=False, batch_size=32)
    whole, _ = quantize(model, spec, x)
    monkeypatch.setattr("cat_plugin.ptq.graph.executor._PASS", 0)
    cut, report = quantize(model, dataclasses.replace(spec, memory_mb=1), x)
    assert report.cache["peak_bytes"] <= 1 << 20
    torch.testing.assert_close(cut(x), whole(x), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"on calibration batch 0 \(inputs 0\.\.1\)"):
        quantize(model, dataclasses.replace(spec, memory_mb=1), x)
