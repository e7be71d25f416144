"""Bits layer by layer until a trial is good enough."""

from __future__ import annotations

import pytest
import torch

import cat_plugin
from cat_plugin.errors import RecipeError
from cat_plugin.ptq.sensitivity_analysis import Sensitivity
from cat_plugin.recipe.layers import rungs
from tests.hosts.conftest import INC
from tests.recipe.test_run import recipe

__all__ = ["recipe"]

needs_host = pytest.mark.skipif(INC == (0, 0), reason="no Neural Compressor is installed")
LAYERS = "algorithm: cat\ncat: {w_bits: 2, a_bits: 2, preset: fast, mode: diagonal, num_clusters: 4}\ntuning: {strategy: layers%s}\n"


def _layer(name, weights, divergence, bits=2):
    return Sensitivity(name, "linear", bits, bits, weights, divergence, 0.0, divergence, 0.0)


def test_what_does_most_damage_for_its_bytes_is_raised_first():
    layers = [
        _layer("first", 10, 0.4, bits=8),
        _layer("large", 1000, 0.5),
        _layer("small", 10, 0.4),
        _layer("harmless", 500, 0.1),
    ]
    assert rungs(layers) == [[], ["small", "large"], ["small", "large", "harmless"]]


@needs_host
def test_bits_are_raised_until_the_criterion_is_met(task, recipe):
    made = recipe(LAYERS % ", accuracy_criterion: {absolute: 0.02}")
    best = made.run(task.net, task.batches, task.accuracy)
    raised = [len(trial.config.get("overrides") or {}) for trial in made.trials]
    assert raised == sorted(set(raised))
    assert raised[0] == 0
    assert [trial.met for trial in made.trials] == [False] * (len(raised) - 1) + [True]
    assert torch.equal(task.logits(best), task.logits(made.trials[-1].model))


@needs_host
def test_layers_need_a_score(task, recipe):
    with pytest.raises(RecipeError, match="strategy: layers; pass eval_fn"):
        recipe(LAYERS % "").run(task.net, task.batches)


@pytest.mark.parametrize("cat", ["{w_bits: [4, 2]}", "{base: rtn}", "[{w_bits: 4}, {w_bits: 2}]"])
def test_layers_start_from_one_configuration(tmp_path, cat):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"algorithm: cat\ncat: {cat}\ntuning: {{strategy: layers}}\n")
    with pytest.raises(RecipeError, match="one configuration of the plugin's own engine"):
        cat_plugin.load_recipe(path)
