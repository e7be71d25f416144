"""Calibration calls have one owner: what is held is passed on, what is recorded lies in one tensor."""

from __future__ import annotations

import pytest
import torch

from cat_plugin.batches import as_calls, stacked
from cat_plugin.errors import CATError
from cat_plugin.hosts.recording import Replay, record_run
from cat_plugin.recipe import runners


def test_held_calls_are_passed_on_as_they_are(task):
    calls = list(as_calls(task.batches))
    kept = record_run(task.net, Replay(calls))
    assert kept is calls
    recorded = record_run(task.net, task.run_fn)
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(kept, recorded, strict=True))


def test_replayed_calls_run_any_model(task):
    seen = []
    handle = task.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    Replay(list(as_calls(task.batches)))(task.net)
    handle.remove()
    assert all(one is other for one, other in zip(seen, task.batches, strict=True))


def test_recorded_calls_are_copies_in_one_tensor(task):
    buffer = torch.empty_like(task.batches[0])

    def run_fn(model):
        for batch in task.batches:
            model(buffer.copy_(batch))

    calls = record_run(task.net, run_fn)
    assert all(torch.equal(call.args[0], batch) for call, batch in zip(calls, task.batches, strict=True))
    assert stacked([call.args[0] for call in calls]).data_ptr() == calls[0].args[0].data_ptr()


def test_a_recipe_takes_the_first_runner_whose_host_is_there(monkeypatch):
    monkeypatch.setattr(runners, "_known", {})
    with pytest.raises(CATError, match="no Neural Compressor is installed"):
        runners.find_runner()
    runners.register_runner("no_such_host.torch", "nowhere")
    runners.register_runner("json.tool", __name__)
    runners.register_runner("json", "nowhere")
    assert runners.find_runner() is run


def run():
    """What the runner of this file is."""
