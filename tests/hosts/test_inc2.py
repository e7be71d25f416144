"""Neural Compressor 2.x, the Python API (2.4 to 2.6, 3.2 to 3.7) and the YAML API (2.4 to 2.6)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cat_plugin.errors import CalibrationError, HostError, RecipeError
from tests.trained import Loader

from .conftest import INC, needs_inc2

pytestmark = needs_inc2
needs_yaml = pytest.mark.skipif(INC >= (3, 0), reason="the YAML API is in 2.4 to 2.6 only")

if (2, 0) <= INC < (3, 8):
    from neural_compressor import PostTrainingQuantConfig, quantization
    from neural_compressor.config import AccuracyCriterion, TuningCriterion

LOW = {"w_bits": 3, "a_bits": 4, "preset": "fast", "mode": "diagonal", "num_clusters": 4}


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """The host writes its history into the working directory."""
    monkeypatch.chdir(tmp_path)


def fit(task, recipes, eval_func=None, loader=None, **options):
    config = PostTrainingQuantConfig(recipes=recipes, **options)
    return quantization.fit(
        copy.deepcopy(task.net), config, calib_dataloader=loader or Loader(task.batches), eval_func=eval_func
    )


def by_hand(task, quantized, **options):
    from cat_plugin.cluster_affine import ClusterAffine

    with torch.no_grad():
        z_q = torch.cat([quantized(batch) for batch in task.batches]).numpy()
        z_fp = torch.cat([task.net(batch) for batch in task.batches]).numpy()
    estimator = ClusterAffine(random_state=0, **options).fit(z_q, z_fp)
    return estimator.predict(task.logits(quantized).numpy())


def test_host_int8_is_corrected(task):
    made = fit(task, {"cat": True, "cat_args": {"num_clusters": 4}})
    host = fit(task, {})
    assert torch.equal(task.logits(made.model.model), task.logits(host.model))
    expected = by_hand(task, host.model, n_clusters=4)
    np.testing.assert_allclose(task.logits(made.model).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_engine_runs_in_place_of_int8(task):
    from cat_plugin.ptq import QuantSpec, quantize

    made = fit(task, {"cat": True, "cat_args": LOW})
    alone, _ = quantize(task.net, QuantSpec(w_bits=3, a_bits=4, preset="fast"), task.batches)
    assert torch.equal(task.logits(made.model.model), task.logits(alone))
    expected = by_hand(task, alone, n_clusters=4, mode="diagonal")
    np.testing.assert_allclose(task.logits(made.model).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("args", [{"num_clusters": 4}, LOW])
def test_every_trial_evaluates_the_corrected_model(task, args):
    """The baseline apart, each model that the host hands to the evaluation is a corrected one."""
    seen = []

    def eval_func(model):
        seen.append(hasattr(model, "correction"))
        return 1.0 if len(seen) == 1 else 0.5

    made = fit(
        task, {"cat": True, "cat_args": args}, eval_func, tuning_criterion=TuningCriterion(max_trials=3)
    )
    assert seen[0] is False
    assert seen[1:]
    assert all(seen[1:])
    assert made is None


@pytest.mark.parametrize("args", [{"num_clusters": [4, 2]}, {**LOW, "w_bits": [3, 2]}])
def test_model_after_recovery_is_corrected(task, args):
    """A later trial drops the model of an earlier one, which the host then quantizes again."""
    scores = iter([1.0, 0.999, 0.2])

    def eval_func(model):
        return next(scores)

    made = fit(
        task,
        {"cat": True, "cat_args": args},
        eval_func,
        quant_level=1,
        tuning_criterion=TuningCriterion(max_trials=2, timeout=100),
        accuracy_criterion=AccuracyCriterion(tolerable_loss=0.01),
    )
    first = {"num_clusters": 2} if "w_bits" not in args else {"w_bits": 3}
    assert {key: made.model.config[key] for key in first} == first
    alone = fit(task, {"cat": True, "cat_args": {**args, **first}})
    assert torch.equal(task.logits(made.model), task.logits(alone.model))


def test_lists_are_tried_and_the_engine_stops_when_they_are_out(task):
    tried = []

    def eval_func(model):
        if hasattr(model, "config"):
            tried.append((model.config["w_bits"], model.config["num_clusters"]))
        return 0.1 if tried else 1.0

    fit(task, {"cat": True, "cat_args": {**LOW, "w_bits": [3, 2], "num_clusters": [8, 4]}}, eval_func)
    assert tried == [(3, 4), (3, 8), (2, 4), (2, 8)]


def test_weight_only_of_the_host(task):
    approach = {
        "approach": "weight_only",
        "op_type_dict": {
            ".*": {"weight": {"bits": 3, "group_size": 16, "scheme": "sym", "algorithm": "RTN"}}
        },
    }
    made = fit(task, {"cat": True, "cat_args": {"num_clusters": 4}}, **copy.deepcopy(approach))
    host = fit(task, {}, **copy.deepcopy(approach))
    assert torch.equal(task.logits(made.model.model), task.logits(host.model))
    assert not torch.equal(task.logits(made.model), task.logits(host.model))


def test_loader_without_labels_and_calibration_function(task):
    plain = fit(task, {"cat": True, "cat_args": LOW})
    bare = fit(task, {"cat": True, "cat_args": LOW}, loader=Loader(task.batches, labels=False))
    config = PostTrainingQuantConfig(recipes={"cat": True, "cat_args": LOW})
    by_function = quantization.fit(copy.deepcopy(task.net), config, calib_func=task.run_fn)
    assert torch.equal(task.logits(plain.model), task.logits(bare.model))
    assert torch.equal(task.logits(plain.model), task.logits(by_function.model))


@pytest.mark.parametrize("recipes", [{}, {"cat": False}])
def test_host_without_cat_is_the_host(task, recipes):
    made = fit(task, recipes)
    assert not hasattr(made.model, "correction")


def test_other_recipes_are_kept_and_unknown_ones_still_dropped():
    config = PostTrainingQuantConfig(recipes={"cat": True, "smooth_quant": True, "no_such_recipe": 1})
    assert config.recipes["cat"] is True
    assert config.recipes["smooth_quant"] is True
    assert "no_such_recipe" not in config.recipes
    assert "cat" not in PostTrainingQuantConfig(recipes={"smooth_quant": True}).recipes


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"cat": True, "cat_args": {"w_bit": 3}}, "did you mean 'w_bits'"),
        ({"cat": True, "cat_args": {"w_bits": 9}}, "2 to 8"),
        ({"cat": True, "cat_args": {"base": {"rtn": {}}}}, "the host's own approach"),
        ({"cat": True, "cat_args": [{"w_bits": 4}, {"alpha": 0.3}]}, "all of them w_bits, or none"),
        ({"cat": True, "cat_args": {"holdout": 0.5}}, "the host's int8 sees all of them"),
        ({"cat": True, "cat_args": 3}, "expected a mapping"),
        ({"cat": "yes"}, "True or False"),
        ({"cat": False, "cat_args": {}}, "remove one"),
    ],
)
def test_recipes_that_cannot_be(recipes, message):
    with pytest.raises(RecipeError, match=message):
        PostTrainingQuantConfig(recipes=recipes)


def test_errors_reach_the_caller(task):
    """The host prints what goes wrong while it tunes and returns None; what CAT says is raised."""
    broken = [*task.batches[:2], task.batches[2] * float("nan")]
    with pytest.raises(CalibrationError, match="batch 2"):
        fit(task, {"cat": True, "cat_args": LOW}, loader=Loader(broken))
    assert fit(task, {}, loader=Loader(task.batches)) is not None


def test_no_calibration_data(task):
    config = PostTrainingQuantConfig(approach="dynamic", recipes={"cat": True})
    with pytest.raises(HostError, match="pass calib_dataloader"):
        quantization.fit(copy.deepcopy(task.net), config)


def test_unregister(task, registered):
    registered()
    config = PostTrainingQuantConfig(recipes={"cat": True})
    assert "cat" not in config.recipes


# The YAML API.

HEAD = "model: {name: net, framework: pytorch_fx}\nquantization:\n  approach: post_training_static_quant\n"


def yaml_fit(task, section, tuning="", eval_func=None):
    from neural_compressor.experimental import Quantization, common

    with open("conf.yaml", "w") as stream:
        stream.write(HEAD + section + tuning)
    quantizer = Quantization("conf.yaml")
    quantizer.model = common.Model(copy.deepcopy(task.net))
    quantizer.calib_dataloader = Loader(task.batches)
    if eval_func is not None:
        quantizer.eval_func = eval_func
    return quantizer.fit()


@needs_yaml
@pytest.mark.parametrize(
    "section",
    [
        "  algorithm: {cat: {num_clusters: 4}}\n",
        "  algorithm: {name: cat, num_clusters: 4}\n",
        "  recipes: {cat: true, cat_args: {num_clusters: 4}}\n",
        "  algorithm: cat\n  recipes: {cat_args: {num_clusters: 4}}\n",
    ],
)
def test_yaml_spellings(task, section):
    made = yaml_fit(task, section)
    host = yaml_fit(task, "")
    assert torch.equal(task.logits(made.model.model), task.logits(host.model))
    expected = by_hand(task, host.model, n_clusters=4)
    np.testing.assert_allclose(task.logits(made.model).numpy(), expected, rtol=1e-4, atol=1e-4)


@needs_yaml
@pytest.mark.parametrize("performance_only", ["true", "false"])
def test_yaml_with_the_engine(task, performance_only):
    tuning = f"tuning: {{exit_policy: {{performance_only: {performance_only}}}}}\n"
    made = yaml_fit(
        task,
        "  algorithm: {cat: {w_bits: 3, a_bits: 4, preset: fast, mode: diagonal, num_clusters: 4}}\n",
        tuning,
        task.accuracy,
    )
    python = fit(task, {"cat": True, "cat_args": LOW})
    assert torch.equal(task.logits(made.model), task.logits(python.model))


@needs_yaml
def test_yaml_after_recovery(task):
    scores = iter([1.0, 0.999, 0.2])
    made = yaml_fit(
        task,
        "  algorithm: {cat: {w_bits: [3, 2], preset: fast}}\n",
        "tuning: {accuracy_criterion: {relative: 0.01}, exit_policy: {max_trials: 2, timeout: 100}}\n",
        lambda model: next(scores),
    )
    assert made.model.config["w_bits"] == 3


@needs_yaml
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("  algorithm: rtn\n", "unknown algorithm 'rtn'"),
        ("  algorithm: {cat: {w_bit: 3}}\n", "did you mean 'w_bits'"),
        ("  recipes: {cat: true, cat_args: {w_bits: 1}}\n", "2 to 8"),
    ],
)
def test_yaml_mistakes(task, section, message):
    with pytest.raises(RecipeError, match=message):
        yaml_fit(task, section)


@needs_yaml
def test_yaml_of_the_host_is_read_as_before(registered):
    from neural_compressor.conf.config import schema

    import cat_plugin

    plain = {
        "model": {"name": "net", "framework": "pytorch_fx"},
        "quantization": {"approach": "post_training_static_quant"},
    }
    with_plugin = schema.validate(copy.deepcopy(plain))
    registered()
    assert schema.validate(copy.deepcopy(plain)) == with_plugin
    with pytest.raises(Exception, match="algorithm"):
        schema.validate({**copy.deepcopy(plain), "quantization": {"algorithm": "cat"}})
    assert not cat_plugin.hosts.is_registered()
