"""``autotune`` of Neural Compressor 3.x: what it tries, what it keeps, what it returns."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import cat_plugin.hosts.pipeline as pipeline
from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.recipe.criteria import Criterion
from cat_plugin.recipe.tuning import TuningRun

from .conftest import INC, needs_inc3

pytestmark = needs_inc3

if INC >= (3, 0):
    from neural_compressor.torch.quantization import RTNConfig, TuningConfig, autotune, quantize

    from cat_plugin import CATConfig


# What is fitted in each cluster is of no concern here; comparing all maps would take most of the time.
QUICK = {"preset": "fast", "mode": "diagonal", "num_clusters": 4}


@pytest.fixture
def counted(monkeypatch):
    """How often the engine ran, and over how many inputs a quantized model was run."""
    import cat_plugin.ptq as ptq

    counts = {"engine": 0, "runs": 0}
    engine, collect = ptq.quantize, pipeline.collect_logits

    def count_engine(*args, **kwargs):
        counts["engine"] += 1
        return engine(*args, **kwargs)

    def count_runs(*args, **kwargs):
        counts["runs"] += 1
        return collect(*args, **kwargs)

    monkeypatch.setattr(ptq, "quantize", count_engine)
    monkeypatch.setattr(pipeline, "collect_logits", count_runs)
    return counts


def tune(task, configs, eval_fn, **options):
    return autotune(
        copy.deepcopy(task.net), TuningConfig(config_set=configs, **options), eval_fn, run_fn=task.run_fn
    )


def test_criterion_never_met_returns_the_best(task, counted, monkeypatch):
    fitted = []
    fit = pipeline.fit_correction
    monkeypatch.setattr(pipeline, "fit_correction", lambda *args: fitted.append(args) or fit(*args))
    scores = iter([1.0, 0.3, 0.5, 0.4, 0.2])
    seen = []

    def eval_fn(model):
        score = next(scores)
        seen.append((score, getattr(model, "config", None)))
        return score

    config = CATConfig(w_bits=[4, 2], a_bits=4, preset="fast", mode="diagonal", num_clusters=[4, 2])
    best = tune(task, [config], eval_fn, tolerable_loss=0.0)
    assert len(seen) == 5
    assert best is not None
    assert best.config == seen[2][1]
    # The host asks for the winner again, and gets the model that was scored: one without a run or a fit of its own.
    assert counted == {"engine": 2, "runs": 2}
    assert len(fitted) == 4
    alone = quantize(
        copy.deepcopy(task.net),
        CATConfig(
            w_bits=4, a_bits=4, preset="fast", mode="diagonal", num_clusters=best.config["num_clusters"]
        ),
        run_fn=task.run_fn,
    )
    assert torch.equal(task.logits(best), task.logits(alone))


def test_trials_share_what_only_the_correction_changes(task, counted):
    calls = []

    def run_fn(model):
        calls.append(model)
        task.run_fn(model)

    config = CATConfig(
        w_bits=[4, 2], a_bits=4, preset="fast", mode="diagonal", num_clusters=[4, 2], alpha=[0.2, 0.4]
    )
    autotune(
        copy.deepcopy(task.net),
        TuningConfig(config_set=[config], tolerable_loss=-1.0),
        lambda model: 0.5,
        run_fn=run_fn,
    )
    assert counted["engine"] == 2
    assert counted["runs"] == 2
    assert len(calls) == 1


def test_a_base_is_quantized_once_for_all_its_corrections(task, monkeypatch):
    from neural_compressor.torch.utils.utility import algos_mapping

    runs = []
    original = algos_mapping["rtn"]

    def rtn(model, *args, **kwargs):
        runs.append(model)
        return original(model, *args, **kwargs)

    monkeypatch.setitem(algos_mapping, "rtn", rtn)
    base = RTNConfig(bits=[3, 4], use_layer_wise=False)
    tune(task, [CATConfig(base=base, num_clusters=[4, 2])], lambda model: 0.5, tolerable_loss=-1.0)
    assert len(runs) == 2


def test_stops_at_the_first_trial_that_is_good_enough(task):
    scores = iter([1.0, 0.5, 0.995, 0.999])
    best = tune(task, [CATConfig(w_bits=[2, 3, 4], **QUICK)], lambda model: next(scores))
    assert best.config["w_bits"] == 3
    assert next(scores) == 0.999


def test_max_trials(task):
    scores = iter([1.0, 0.5, 0.4, 0.9])
    best = tune(task, [CATConfig(w_bits=[2, 3, 4], **QUICK)], lambda model: next(scores), max_trials=2)
    assert best.config["w_bits"] == 2
    assert next(scores) == 0.9


def test_same_configuration_twice_is_one_trial(task):
    scores = iter([1.0, 0.5, 0.4])
    configs = [CATConfig(w_bits=[2, 3], **QUICK), CATConfig(w_bits=2, **QUICK)]
    best = tune(task, configs, lambda model: next(scores))
    assert best.config["w_bits"] == 2


def test_callers_tuning_config_keeps_its_number_of_trials(task):
    config = TuningConfig(config_set=[CATConfig(**QUICK)], max_trials=7)
    autotune(copy.deepcopy(task.net), config, task.accuracy, run_fn=task.run_fn)
    assert config.max_trials == 7


def test_beside_a_configuration_of_the_host(task):
    configs = [RTNConfig(bits=4, use_layer_wise=False), CATConfig(**QUICK)]
    scores = iter([1.0, 0.5, 0.6])
    best = tune(task, configs, lambda model: next(scores))
    assert best.config["preset"] == "fast"


def test_the_host_alone_is_served_by_the_host(task, monkeypatch):
    from cat_plugin.hosts.inc3 import tuning

    def refuse(*args, **kwargs):
        raise AssertionError("CAT's monitor has no business here")

    monkeypatch.setattr(tuning, "_Monitor", refuse)
    best = tune(task, [RTNConfig(bits=4, use_layer_wise=False)], task.accuracy, max_trials=1)
    assert not hasattr(best, "correction")


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        ({"top1": 1.0}, CATTypeError, "eval_fn returned a dict; expected one number"),
        (torch.ones(2), CATTypeError, "eval_fn returned a Tensor"),
        (float("nan"), CATValueError, "eval_fn returned NaN for the full-precision model"),
    ],
)
def test_scores_that_are_no_number(task, score, error, message):
    with pytest.raises(error, match=message):
        tune(task, [CATConfig(w_bits=[2, 3], **QUICK)], lambda model: score)


def test_a_score_may_be_a_tensor_of_one_number(task):
    assert tune(task, [CATConfig(w_bits=3, **QUICK)], lambda model: torch.tensor(1.0)).config["w_bits"] == 3


def test_trial_table_is_printed(task):
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger = logging.getLogger("neural_compressor")
    handler = Keep()
    logger.addHandler(handler)
    try:
        scores = iter([1.0, 0.5, 0.75])
        tune(task, [CATConfig(w_bits=[2, 3], **QUICK)], lambda model: next(scores))
    finally:
        logger.removeHandler(handler)
    text = "\n".join(lines)
    assert "full precision" in text
    assert [line.split()[0] for line in lines if "W2A4 fast, K 4" in line] == ["1"]
    assert [line.split()[0] for line in lines if "W3A4 fast, K 4" in line] == ["2*"]


@pytest.mark.parametrize(
    ("criterion", "scores", "stops_after", "best"),
    [
        (Criterion(0.1), [1.0, 0.5, 0.9, 0.95], 2, 1),
        (Criterion(0.1, relative=False), [0.5, 0.3, 0.41, 0.5], 2, 1),
        (Criterion(0.1, higher_is_better=False), [1.0, 2.0, 1.1, 1.0], 2, 1),
        (Criterion(0.5, relative=False, higher_is_better=False), [3.0, 4.0, 3.6, 3.55], 3, 2),
        (Criterion(0.1, try_all=True), [1.0, 0.95, 0.99, 0.97], 3, 1),
        (Criterion(0.0), [1.0, float("nan"), 0.2, 0.1], 3, 1),
    ],
)
def test_criteria_that_the_host_lacks(task, criterion, scores, stops_after, best):
    run = TuningRun(criterion)
    left = iter(scores)
    config = TuningConfig(config_set=[CATConfig(w_bits=[4, 3, 2], **QUICK)])
    config.cat_run = run
    made = autotune(copy.deepcopy(task.net), config, lambda model: next(left), run_fn=task.run_fn)
    assert [trial.score for trial in run.trials if trial.score == trial.score] == [
        score for score in scores[1 : stops_after + 1] if score == score
    ]
    assert made.config["w_bits"] == [4, 3, 2][best]


def test_timeout(task, monkeypatch):
    run = TuningRun(Criterion(timeout=10.0))
    now = [0.0]
    monkeypatch.setattr(run._clock, "elapsed", lambda: now[0])

    def eval_fn(model):
        now[0] += 6.0
        return 1.0 if not hasattr(model, "config") else 0.1

    config = TuningConfig(config_set=[CATConfig(w_bits=[4, 3, 2], **QUICK)])
    config.cat_run = run
    autotune(copy.deepcopy(task.net), config, eval_fn, run_fn=task.run_fn)
    assert len(run.trials) == 1
