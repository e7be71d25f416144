"""Hand a recipe to Neural Compressor 2.x."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.config import AccuracyCriterion, TuningCriterion
from neural_compressor.config import options as host_options
from torch import nn

from cat_plugin.calls import ModelCall
from cat_plugin.correction import CorrectedModule
from cat_plugin.errors import CATError, HostError, RecipeError
from cat_plugin.hosts import is_registered, register, unregister
from cat_plugin.hosts.inc2.loader import CallLoader
from cat_plugin.recipe import options
from cat_plugin.recipe.tuning import TuningRun

__all__ = ["run"]

# The weight-only parameters of 3.x that 2.x has too, and how 2.x says them.
_WEIGHT_ONLY = {"bits": "bits", "group_size": "group_size", "use_sym": "scheme", "dtype": "dtype"}


def _approach(base: Mapping[str, Any] | None) -> dict[str, Any]:
    """The host's arguments for a base, in the words of 2.x."""
    if base is None:
        return {"approach": "static"}
    name, params = next(iter(base.items()))
    params = dict(params or {})
    if name == "static_quant":
        if params:
            raise RecipeError(
                f"static_quant with {', '.join(params)}: parameters of static int8 have other names and meanings in "
                "Neural Compressor 2.x; a recipe for both generations leaves them at their defaults"
            )
        return {"approach": "static"}
    options.check_keys(params, _WEIGHT_ONLY, f"{name}, of which Neural Compressor 2.x has these")
    weight: dict[str, Any] = {"algorithm": name.upper(), "bits": 4, "group_size": 32, "scheme": "sym"}
    for key, value in params.items():
        weight[_WEIGHT_ONLY[key]] = value if key != "use_sym" else ("sym" if value else "asym")
    return {"approach": "weight_only", "op_type_dict": {".*": {"weight": weight}}}


def _bases(base: Any) -> list[dict[str, Any] | None]:
    """Every base of a configuration, without lists."""
    if base is None:
        return [None]
    found: list[dict[str, Any] | None] = []
    for each in base if isinstance(base, list) else [base]:
        if isinstance(each, str):
            each = {each: {}}
        if not isinstance(each, Mapping) or len(each) != 1:
            raise RecipeError(
                f"base is {each!r}; expected the name of one algorithm of the host and its parameters"
            )
        name, params = next(iter(each.items()))
        known = ("rtn", "gptq", "awq", "teq", "static_quant")
        if name not in known:
            raise RecipeError(f"unknown algorithm {name!r} in base; {options.nearest(name, known)}")
        choices = {k: v if isinstance(v, list) else [v] for k, v in (params or {}).items()}
        found += [{name: dict(zip(choices, values, strict=True))} for values in product(*choices.values())]
    return found


def run(
    configurations: list[dict[str, Any]],
    model: nn.Module,
    calls: list[ModelCall],
    eval_fn: Callable[[nn.Module], float] | None,
    run: TuningRun,
) -> nn.Module:
    """Run a recipe through the host's ``fit``, once for each base; the :class:`~cat_plugin.recipe.runners.Runner` of 2.x.

    The corrected module itself is returned, not the host's wrapper of it.
    """
    passes = []
    for params in configurations:
        rest = {key: value for key, value in params.items() if key != "base"}
        for base in _bases(params.get("base")):
            # The host's int8 is what runs without options of the engine, so the engine needs to be asked for.
            args = dict(rest) if base is not None else {"w_bits": 4, "a_bits": 4, **rest}
            passes.append((base, args))
    merged: list[tuple[Any, list[dict[str, Any]]]] = []
    for base, args in passes:
        if merged and merged[-1][0] == base:
            merged[-1][1].append(args)
        else:
            merged.append((base, [args]))
    attached = is_registered()
    if not attached:
        register()
    workspace = host_options.workspace
    baseline: list[float] = []
    try:
        with tempfile.TemporaryDirectory(prefix="cat-") as scratch:
            host_options.workspace = scratch
            for base, arguments in merged:
                made = _fit(base, arguments, model, CallLoader(calls), eval_fn, run, baseline)
                if eval_fn is None:
                    return made
                if run.trials and run.done():
                    break
    finally:
        host_options.workspace = workspace
        if not attached:
            unregister()
    if run.best_model is None:
        raise HostError("Neural Compressor finished without trying a configuration; its log says why")
    return run.best_model


def _fit(
    base: Mapping[str, Any] | None,
    arguments: list[dict[str, Any]],
    model: nn.Module,
    loader: CallLoader,
    eval_fn: Callable[[nn.Module], float] | None,
    run: TuningRun,
    baseline: list[float],
) -> nn.Module:
    criterion = run.criterion
    failures: list[Exception] = []

    def evaluate(candidate: nn.Module) -> float:
        try:
            if not isinstance(candidate, CorrectedModule):
                if not baseline:
                    assert eval_fn is not None
                    baseline.append(eval_fn(candidate))
                    run.started(baseline[0])
                return baseline[0]
            assert eval_fn is not None
            score = eval_fn(candidate)
            config = dict(candidate.config or {})
            if base is not None:
                config["base"] = {name: dict(params or {}) for name, params in base.items()}
                candidate.config = config
            run.add(config, score)
        except Exception as error:
            # The host would print it and return None.
            failures.append(error)
            raise
        return score

    # The recipe's own criterion decides; the host accepts no share of 1 or more.
    tolerance = max(-0.99, min(0.99, criterion.tolerance)) if criterion.relative else criterion.tolerance
    conf = PostTrainingQuantConfig(
        recipes={"cat": True, "cat_args": arguments},
        calibration_sampling_size=loader.samples(),
        accuracy_criterion=AccuracyCriterion(
            higher_is_better=criterion.higher_is_better,
            criterion="relative" if criterion.relative else "absolute",
            tolerable_loss=tolerance,
        ),
        tuning_criterion=TuningCriterion(max_trials=10**6),
        **_approach(base),
    )
    conf.cat_run = run
    try:
        made = quantization.fit(
            copy.deepcopy(model),  # without tuning the host works in place
            conf,
            calib_dataloader=loader,
            eval_func=None if eval_fn is None else evaluate,
        )
    except CATError as error:
        if failures and error is not failures[0]:
            raise failures[0] from None
        raise
    if failures:
        raise failures[0]
    if eval_fn is not None:
        return model
    if made is None:
        raise HostError("Neural Compressor could not quantize this model; its log says why")
    corrected: nn.Module = made.model
    return corrected
