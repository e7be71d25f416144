"""The small trained network and its data, for models that are saved and loaded, and what is asked of each."""

from __future__ import annotations

import json
import zipfile

import torch
from safetensors.torch import load_file

import cat_plugin
from tests.trained import _task, task

__all__ = ["_task", "check_round_trip", "task"]


def check_round_trip(task, corrected, directory, model=None):
    path = cat_plugin.save(corrected, directory)
    assert sorted(file.name for file in path.iterdir()) == ["cat.json", "model.safetensors"]
    for file in path.iterdir():
        assert not zipfile.is_zipfile(file)
    assert load_file(path / "model.safetensors")
    loaded = cat_plugin.load(path, model=model)
    saved = getattr(corrected, "_model", corrected)
    assert torch.equal(task.logits(loaded), task.logits(saved))
    assert torch.equal(task.logits(loaded.model), task.logits(saved.model))
    assert loaded.config == json.loads(json.dumps(saved.config))
    again = cat_plugin.load(cat_plugin.save(loaded, directory), model=model)
    assert torch.equal(task.logits(again), task.logits(saved))
