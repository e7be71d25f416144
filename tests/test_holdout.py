"""Calibration rows that the engine is not given: which, how many, and what the correction makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat_plugin.calls import ModelCall, collect_logits
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.correction import correct
from cat_plugin.errors import CATValueError, RecipeError
from cat_plugin.hosts.pipeline import CalibrationRecord, quantize_and_correct, rows_for_engine
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.recipe import options
from tests.trained import _task, task

__all__ = ["_task", "task"]

FAST = {"w_bits": 3, "a_bits": 4, "preset": "fast", "first_bits": 3, "last_bits": 3, "num_clusters": 4}


@pytest.mark.parametrize(
    ("rows", "num_samples", "holdout", "given"),
    [
        (1024, 1024, 0.25, 768),
        (512, 1024, 0.25, 384),
        (511, 1024, 0.25, 511),  # too few to divide
        (1100, 1024, 0.25, 825),
        (4096, 1024, 0.25, 1024),  # enough are left over anyway
        (1024, 1024, 0.0, 1024),
        (1024, 1024, 0.9999, 1),
    ],
)
def test_rows_for_the_engine(rows, num_samples, holdout, given):
    assert rows_for_engine(rows, num_samples, holdout) == given


@pytest.fixture
def record(task):
    calls = [ModelCall((batch,)) for batch in [*task.batches, *task.images[:350].split(100)]]  # 600 rows
    return CalibrationRecord(calls, collect_logits(task.net, calls, "full-precision"))


@pytest.mark.parametrize(
    ("further", "given", "masked"),
    [
        ({"holdout": 0.25}, 450, True),
        ({"holdout": 0}, 600, False),
        ({"holdout": 0, "num_samples": 300}, 300, True),
        ({"holdout": 0, "num_samples": 500}, 500, False),  # 100 are too few to judge by
    ],
)
def test_the_engine_gets_the_first_rows_and_the_rest_judge(task, record, further, given, masked):
    corrected = quantize_and_correct({**FAST, **further}, task.net, record, None)
    assert corrected.report["num_samples"] == given
    # The same by hand: the engine on these rows, the estimator on all.
    inputs = torch.cat([call.args[0] for call in record.calls])
    spec = {key: value for key, value in FAST.items() if key != "num_clusters"}
    module, _ = quantize(task.net, QuantSpec(**spec, num_samples=given), [inputs])
    with torch.no_grad():
        z_q, z_fp = (model(inputs).detach().numpy() for model in (module, task.net))
        wanted = module(task.images)
        estimator = ClusterAffine(n_clusters=4, random_state=0)
        estimator.fit(z_q, z_fp, tuned_mask=np.arange(600) < given if masked else None)
        np.testing.assert_allclose(corrected.model(task.images), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            corrected(task.images), estimator.predict(wanted.numpy()), rtol=1e-3, atol=1e-3
        )
    assert corrected.estimator.best_params_ == estimator.best_params_


def test_an_algorithm_of_the_host_sees_all_rows(task, record):
    with pytest.raises(RecipeError, match="both base and holdout"):
        options.check({"base": {"rtn": {}}, "holdout": 0.5})
    made = quantize_and_correct({"base": {"rtn": {}}}, task.net, record, lambda: task.net)
    assert made.estimator.n_rows_seen_ == 600
    assert not {c for c in made.estimator.cv_results_["param_tuned_rows"] if not c}


@pytest.mark.parametrize("value", [1, -0.1, True, "half"])
def test_values_out_of_range(value):
    with pytest.raises(RecipeError, match="holdout"):
        options.check({"holdout": value})


def test_tuned_mask_of_correct(task):
    rows = torch.cat([*task.batches, task.images])[:400]
    spec = QuantSpec(w_bits=2, a_bits=3, preset="fast", num_samples=200)
    module, _ = quantize(task.net, spec, [rows])
    mask = [True] * 200 + [False] * 200
    estimator = ClusterAffine(n_clusters=2, random_state=0)
    corrected = correct(module, task.net, rows.split(100), estimator, tuned_mask=mask)
    with torch.no_grad():
        z_q, z_fp = module(rows).numpy(), task.net(rows).detach().numpy()
    expected = ClusterAffine(n_clusters=2, random_state=0).fit(z_q, z_fp, tuned_mask=mask).predict(z_q)
    np.testing.assert_allclose(corrected(rows).detach(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(CATValueError, match="tuned_mask"):
        correct(module, task.net, rows.split(100), tuned_mask=mask[:-1])
