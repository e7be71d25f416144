"""``Recipe.run`` on whichever host is installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import cat_plugin
from cat_plugin.errors import CalibrationError, CATTypeError, CATValueError, HostError, RecipeError
from tests.hosts.conftest import INC

needs_host = pytest.mark.skipif(INC == (0, 0), reason="no Neural Compressor is installed")


@pytest.fixture
def recipe(tmp_path):
    def make(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return cat_plugin.load_recipe(path)

    return make


LOW_BIT = "algorithm: cat\ncat: {w_bits: %s, a_bits: 4, preset: fast, mode: diagonal, num_clusters: 4}\n"


@needs_host
def test_one_configuration_without_evaluation(task, recipe):
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.ptq import QuantSpec, quantize

    made = recipe(LOW_BIT % 3).run(task.net, task.batches)
    alone, _ = quantize(task.net, QuantSpec(w_bits=3, a_bits=4, preset="fast"), task.batches)
    estimator = ClusterAffine(mode="diagonal", n_clusters=4, random_state=0)
    expected = cat_plugin.correct(alone, task.net, task.batches, estimator)
    assert torch.equal(task.logits(made), task.logits(expected))


@needs_host
def test_tuning_keeps_a_table_of_trials(task, recipe):
    made = recipe(LOW_BIT % "[4, 2]" + "tuning: {try_all: true}\n")
    best = made.run(task.net, task.batches, task.accuracy)
    assert made.baseline == task.accuracy(task.net)
    assert [trial.config["w_bits"] for trial in made.trials] == [4, 2]
    for trial in made.trials:
        assert trial.score == task.accuracy(trial.model)
        assert trial.seconds > 0
    winner = max(made.trials, key=lambda trial: trial.score)
    assert torch.equal(task.logits(best), task.logits(winner.model))


@needs_host
def test_models_are_not_kept_when_not_wanted(task, recipe):
    made = recipe(LOW_BIT % "[4, 2]" + "tuning: {try_all: true}\n")
    made.run(task.net, task.batches, task.accuracy, keep_models=False)
    assert [trial.model for trial in made.trials] == [None, None]


@needs_host
@pytest.mark.parametrize(
    ("tuning", "scores", "wanted"),
    [
        ("{accuracy_criterion: {relative: 0.1}}", [1.0, 0.5, 0.95, 0.99], 3),
        ("{accuracy_criterion: {absolute: 0.1}}", [0.5, 0.3, 0.41, 0.5], 3),
        ("{accuracy_criterion: {relative: 0.1, higher_is_better: false}}", [1.0, 2.0, 1.05, 1.0], 3),
        ("{exit_policy: {max_trials: 2}}", [1.0, 0.5, 0.4, 1.0], 4),
        ("{try_all: true}", [1.0, 1.0, 0.9, 1.1], 2),
        ("{tolerable_loss: 0.0}", [1.0, 0.1, 0.3, 0.2], 3),
    ],
)
def test_criteria_hold(task, recipe, tuning, scores, wanted):
    """Scores are handed out in order: the full-precision model first, then W4, W3, W2."""
    left = iter(scores)
    by_model = {}

    def eval_fn(model):
        # A host may evaluate a model twice; the same model keeps its score.
        if id(model) not in by_model:
            by_model[id(model)] = (next(left), model)
        return by_model[id(model)][0]

    made = recipe(LOW_BIT % "[4, 3, 2]" + f"tuning: {tuning}\n")
    assert made.run(task.net, task.batches, eval_fn).config["w_bits"] == wanted


@needs_host
def test_timeout_holds(task, recipe, monkeypatch):
    import cat_plugin.recipe.criteria as criteria

    now = [0.0]
    monkeypatch.setattr(criteria.Clock, "elapsed", lambda self: now[0])

    def eval_fn(model):
        now[0] += 6.0
        return 1.0 if not hasattr(model, "config") else 0.1

    made = recipe(LOW_BIT % "[4, 3, 2]" + "tuning: {exit_policy: {timeout: 10}}\n")
    assert made.run(task.net, task.batches, eval_fn).config["w_bits"] == 4
    assert len(made.trials) == 1


@needs_host
def test_sampling_size_cuts_the_calibration(task, recipe):
    made = recipe(LOW_BIT % 3)
    made.sampling_size = 120
    cut = made.run(task.net, task.batches)
    expected = recipe(LOW_BIT % 3).run(task.net, [*task.batches[:2], task.batches[2][:20]])
    assert torch.equal(task.logits(cut), task.logits(expected))


@needs_host
def test_weight_only_base(task, recipe):
    made = recipe("algorithm: cat\nrtn: {bits: [3, 4], group_size: 16}\ncat: {num_clusters: 4}\n")
    best = made.run(task.net, task.batches, task.accuracy)
    assert best.config["base"]["rtn"]["bits"] == made.trials[-1].config["base"]["rtn"]["bits"]
    assert {trial.config["base"]["rtn"]["group_size"] for trial in made.trials} == {16}


@pytest.mark.skipif(
    (3, 0) <= INC < (3, 9), reason=f"static int8 in Neural Compressor {INC[0]}.{INC[1]} fails with torch 2.13"
)
@needs_host
def test_static_int8_base(task, recipe):
    made = recipe("quantization: {approach: static, algorithm: cat, cat: {num_clusters: 4}}\n")
    best = made.run(task.net, task.batches)
    assert task.logits(best).shape == (len(task.images), 10)
    assert task.accuracy(best) > task.accuracy(task.net) - 0.05
    tuned = made.run(task.net, task.batches, task.accuracy)
    assert torch.equal(task.logits(tuned), task.logits(best))
    assert [trial.config["base"] for trial in made.trials] == [best.config["base"]]


@needs_host
def test_choice_without_evaluation(task, recipe):
    with pytest.raises(RecipeError, match="pass eval_fn"):
        recipe(LOW_BIT % "[4, 2]").run(task.net, task.batches)


@needs_host
@pytest.mark.parametrize(
    ("calibration", "message"),
    [([], "no batch"), ([torch.full((4, 1, 8, 8), float("nan"))], "batch 0")],
)
def test_calibration_that_cannot_be_used(task, recipe, calibration, message):
    with pytest.raises(CalibrationError, match=message):
        recipe(LOW_BIT % 3).run(task.net, calibration)


@needs_host
def test_score_that_is_no_number(task, recipe):
    with pytest.raises(CATTypeError, match="eval_fn returned a str"):
        recipe(LOW_BIT % 3).run(task.net, task.batches, lambda model: "good")


@needs_host
def test_score_that_raises(task, recipe):
    with pytest.raises(
        CATValueError, match="eval_fn raised KeyError: 'top1'; it is given a model alone"
    ) as caught:
        recipe(LOW_BIT % 3).run(task.net, task.batches, lambda model: {}["top1"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_model_that_is_none(recipe):
    with pytest.raises(CATTypeError, match="model is a NoneType"):
        recipe(LOW_BIT % 3).run(None, [])


def test_without_any_host(task, recipe, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "neural" in name else find(name, *a)
    )
    monkeypatch.delitem(sys.modules, "neural_compressor", raising=False)
    with pytest.raises(HostError, match="no Neural Compressor is installed"):
        recipe(LOW_BIT % 3).run(task.net, task.batches)


@needs_host
def test_progress_and_resume(task, recipe, tmp_path):
    """A run that is stopped after its first unit goes on from there and ends with the same model."""
    text = LOW_BIT.replace("preset: fast", "preset: balanced, unit_steps: 5, refinement_steps: 2") % 3
    told = []

    class Stopped(Exception):
        pass

    def stop(title, news):
        told.append((title, news))
        if sum(each.loss_after is not None for _, each in told) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        recipe(text).run(task.net, task.batches, progress=stop, resume=tmp_path / "state")
    assert "W3A4" in told[0][0]
    assert list((tmp_path / "state").glob("*/state.json"))
    heard = []
    made = recipe(text).run(
        task.net, task.batches, progress=lambda _, news: heard.append(news), resume=tmp_path / "state"
    )
    finished = [news.stage for news in heard if news.loss_after is not None]
    assert finished[0] == [news.stage for _, news in told if news.loss_after is not None][1]
    whole = recipe(text).run(task.net, task.batches)
    assert torch.equal(task.logits(made), task.logits(whole))


@needs_host
def test_scores_that_are_all_nan_are_warned_of(task, recipe, caplog):
    made = recipe(LOW_BIT % "[4, 2]" + "tuning: {try_all: true}\n")
    scores = iter([0.5, float("nan"), float("nan")])
    made.run(task.net, task.batches, lambda model: next(scores))
    assert "the score of every trial is NaN" in caplog.text
    caplog.clear()
    scores = iter([0.5, float("nan"), 0.4])
    made.run(task.net, task.batches, lambda model: next(scores))
    assert "NaN" not in caplog.text
