"""One recipe file for every host: read it, run it with whichever Neural Compressor is installed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError, CATTypeError, RecipeError, no_calibration_batch
from cat_plugin.recipe import options
from cat_plugin.recipe.criteria import Criterion, Trial
from cat_plugin.recipe.layers import ladder
from cat_plugin.recipe.progress import current_watch, watching
from cat_plugin.recipe.reading import Located, read
from cat_plugin.recipe.runners import find_runner
from cat_plugin.recipe.tuning import TuningRun

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.calls import ModelCall
    from cat_plugin.ptq.progress import Progress

__all__ = ["Recipe", "load_recipe"]

_log = logging.getLogger("cat_plugin")
_MANY = 300
_HOST_ALGORITHMS = ("rtn", "gptq", "awq", "teq", "static_quant")


def _cat_params(located: Located) -> tuple[list[dict[str, Any]], tuple[str | int, ...], dict[str, Any]]:
    """The configurations under whichever spelling was used, where they stand, and the section around them."""
    data = located.data
    section, prefix = data, ()  # type: tuple[dict[str, Any], tuple[str | int, ...]]
    if data.get("quantization") is not None:
        section, prefix = data["quantization"], ("quantization",)
        stray = [key for key in ("algorithm", "cat", *_HOST_ALGORITHMS) if key in data]
        if stray:
            raise located.error(
                (stray[0],), f"{stray[0]} stands beside quantization; move it into that section"
            )
    found: list[tuple[tuple[str | int, ...], Any]] = []
    asked = False
    algorithm = section.get("algorithm")
    if isinstance(algorithm, str):
        _check_algorithm(located, (*prefix, "algorithm"), algorithm)
        asked = True
    elif isinstance(algorithm, dict):
        asked = True
        where = (*prefix, "algorithm")
        if "name" in algorithm:
            _check_algorithm(located, (*where, "name"), algorithm["name"])
            found.append((where, {key: value for key, value in algorithm.items() if key != "name"}))
        else:
            name = next(iter(algorithm))
            if len(algorithm) != 1:
                second = list(algorithm)[1]
                raise located.error(
                    (*where, second), "algorithm names more than one algorithm; expected cat alone"
                )
            _check_algorithm(located, (*where, name), name)
            found.append(((*where, name), algorithm[name]))
    if "cat" in section:
        asked = True
        found.append(((*prefix, "cat"), section["cat"]))
    recipes = section.get("recipes") or {}
    if recipes.get("cat") is False:
        raise located.error((*prefix, "recipes", "cat"), "cat is switched off here; a CAT recipe needs it on")
    if "cat" in recipes or "cat_args" in recipes:
        asked = True
        found.append(((*prefix, "recipes", "cat_args"), recipes.get("cat_args")))
    if not asked:
        raise located.error(prefix, "no algorithm is named; expected 'algorithm: cat' or a section 'cat:'")
    given = [(place, value) for place, value in found if value]
    if len(given) > 1:
        raise located.error(
            given[1][0], "CAT's options stand in two places; put all of them under one 'cat:'"
        )
    place, value = given[0] if given else (found[0][0] if found else prefix, {})
    return (value if isinstance(value, list) else [value or {}]), place, section


def _check_algorithm(located: Located, path: tuple[str | int, ...], name: object) -> None:
    if name != "cat":
        raise located.error(
            path,
            f"unknown algorithm {name!r}; expected cat (an algorithm of the host goes beside it, as in "
            "'algorithm: cat' with 'rtn: {bits: 4}')",
        )


def _base_of(located: Located, section: dict[str, Any]) -> dict[str, Any] | None:
    """What the recipe says is to be quantized by the host."""
    prefix: tuple[str | int, ...] = () if section is located.data else ("quantization",)
    named = [name for name in _HOST_ALGORITHMS if name in section]
    if len(named) > 1:
        raise located.error(
            (*prefix, named[1]), "two algorithms of the host are named; CAT corrects one at a time"
        )
    if named:
        return {named[0]: section[named[0]] or {}}
    approach = section.get("approach")
    if approach in ("weight_only", "post_training_weight_only"):
        return {"rtn": {}}
    if approach is not None:
        return {"static_quant": {}}
    return None


def _criterion(located: Located) -> Criterion:
    tuning = located.data.get("tuning") or {}
    accuracy = tuning.get("accuracy_criterion") or {}
    leave = tuning.get("exit_policy") or {}
    if "relative" in accuracy and "absolute" in accuracy:
        raise located.error(
            ("tuning", "accuracy_criterion", "absolute"),
            "relative and absolute are both given; expected one of them",
        )
    if "tolerable_loss" in tuning and accuracy.keys() & {"relative", "absolute"}:
        raise located.error(
            ("tuning", "tolerable_loss"), "tolerable_loss is the relative criterion of 3.x; it is given twice"
        )
    for key in ("timeout", "max_trials"):
        if key in tuning and key in leave:
            raise located.error(
                ("tuning", "exit_policy", key), f"{key} is given twice, here and under tuning"
            )
    given: dict[str, Any] = {
        "higher_is_better": accuracy.get("higher_is_better"),
        "timeout": tuning.get("timeout", leave.get("timeout")),
        "max_trials": tuning.get("max_trials", leave.get("max_trials")),
        "try_all": tuning.get("try_all"),
    }
    place: tuple[str, ...] = ("tuning", "tolerable_loss")
    tolerance = tuning.get("tolerable_loss")
    for key in ("relative", "absolute"):
        if key in accuracy:
            place, tolerance = ("tuning", "accuracy_criterion", key), accuracy[key]
            given["relative"] = key == "relative"
    if tolerance is not None:
        if tolerance >= 1 and given.get("relative", True):
            raise located.error(
                place,
                f"the relative tolerance is {tolerance:g}, which is {100 * tolerance:g} % of the score; expected a share from "
                "0 to below 1, such as 0.01 for 1 %",
            )
        given["tolerance"] = float(tolerance)
    return Criterion(**{key: value for key, value in given.items() if value is not None})


class Recipe:
    """A checked recipe. Made by :func:`load_recipe`.

    Attributes
    ----------
    path : pathlib.Path
        Where it was read from.
    configurations : list of dict
        CAT's options, one mapping for each entry of ``cat:``; values may be lists.
    criterion : Criterion
        When a trial is good enough, and when to stop.
    sampling_size : int or None
        Calibration samples used at most.
    performance_only : bool
        Quantize once, without tuning.
    by_layers : bool
        Raise the bits of single layers until a trial is good enough (:mod:`cat_plugin.recipe.layers`).
    trials : list of Trial
        Of the last :meth:`run` with an evaluation function: configuration, score, seconds, model.
    baseline : float or None
        Score of the full-precision model in that run.
    """

    def __init__(
        self,
        path: Path,
        configurations: list[dict[str, Any]],
        criterion: Criterion,
        sampling_size: int | None = None,
        performance_only: bool = False,
        by_layers: bool = False,
    ) -> None:
        self.path = path
        self.configurations = configurations
        self.criterion = criterion
        self.sampling_size = sampling_size
        self.performance_only = performance_only
        self.by_layers = by_layers
        self.trials: list[Trial] = []
        self.baseline: float | None = None

    def __repr__(self) -> str:
        return f"Recipe({str(self.path)!r}, {self.configurations})"

    def _calls(self, calibration: Iterable[Any]) -> list[ModelCall]:
        """The calibration calls, up to the sampling size."""
        from cat_plugin.calls import as_calls

        left = self.sampling_size
        calls: list[ModelCall] = []
        for call in as_calls(calibration):
            if left is not None:
                call = call.first(left)
                left -= call.rows
            calls.append(call)
            if left == 0:
                break
        if not calls:
            raise no_calibration_batch()
        return calls

    def run(
        self,
        model: nn.Module,
        calibration: Iterable[Any],
        eval_fn: Callable[[nn.Module], float] | None = None,
        *,
        keep_models: bool = True,
        progress: Callable[[str, Progress], None] | None = None,
        resume: str | Path | None = None,
    ) -> nn.Module:
        """Quantize and correct a model as the recipe says, through the installed host.

        Parameters
        ----------
        model : torch.nn.Module
            The full-precision model; it is left as it is.
        calibration : iterable
            Input batches: tensors or arrays, tuples and lists whose first item is the inputs, or mappings of keyword
            arguments; or one tensor of all inputs.
        eval_fn : callable, optional
            Scores a model. With it the host tunes: it tries the configurations until one meets the
            criterion. Without it the recipe must describe exactly one configuration.
        keep_models : bool, default True
            Whether ``trials`` keep their models; False saves memory with large ones.
        progress : callable, optional
            Called with the trial's title and every :class:`~cat_plugin.ptq.progress.Progress` of the engine.
        resume : path, optional
            Directory for the engine's state after each unit; an interrupted run that is started again with the same
            arguments goes on from there and gives the same result.

        Returns
        -------
        torch.nn.Module
            The best corrected model: ``.model`` is the quantized one, ``.correction`` the fitted step.

        Raises
        ------
        HostError
            When no supported Neural Compressor is installed, or it cannot do what the recipe asks.
        RecipeError
            When there is a choice to be made and no `eval_fn`.
        CalibrationError
            When the calibration data, or what the model makes of them, cannot be used.
        """
        from torch import nn  # here, so that a recipe is read and checked without it

        if not isinstance(model, nn.Module):
            raise CATTypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        if eval_fn is None and self.by_layers:
            raise RecipeError(
                f"{self.path.name} asks for strategy: layers; pass eval_fn, a function that scores a model, by which the layers "
                "that need more bits are found, or leave the strategy out"
            )
        if eval_fn is None and (len(self.configurations) > 1 or options.has_choices(self.configurations[0])):
            raise RecipeError(
                f"{self.path.name} describes several configurations; pass eval_fn, a function that scores a model, so "
                "that one can be chosen, or give each option one value"
            )
        calls = self._calls(calibration)
        run = TuningRun(replace(self.criterion), keep_models=keep_models)
        self.trials, self.baseline = run.trials, None
        configurations = self.configurations
        if self.by_layers and not self.performance_only:
            configurations = ladder(configurations[0], model, calls)
        scorer = None if eval_fn is None or self.performance_only else run.watch(eval_fn)
        watch = replace(current_watch(), listener=progress, resume=None if resume is None else Path(resume))
        try:
            with watching(watch):
                best = find_runner()(configurations, model, calls, scorer, run)
            if run.trials and all(math.isnan(trial.score) for trial in run.trials):
                _log.warning(
                    "the score of every trial is NaN, so that none is better than another; the first is returned: look at what "
                    "the quantized model gives, and at eval_fn"
                )
            return best
        finally:
            self.baseline = run.baseline


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file in the words of Neural Compressor 2.x or 3.x.

    ::

        quantization:
          algorithm: cat
          cat: {w_bits: [4, 2], a_bits: 4, num_clusters: 64, alpha: 0.4}
        tuning:
          accuracy_criterion: {relative: 0.01}
          exit_policy: {max_trials: 10, timeout: 0}

    Parameters
    ----------
    path : str or pathlib.Path
        A YAML file. Its JSON Schema, for editors, is ``cat_plugin/recipe/recipe.schema.json``.

    Returns
    -------
    Recipe

    Raises
    ------
    RecipeError
        With file, line and column, and for an unknown key the nearest known one.
    CATTypeError
        `path` is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise CATTypeError(f"path is a {type(path).__name__}; expected the path of a YAML file")
    path = Path(path)
    located = read(path)
    given, place, section = _cat_params(located)
    base = _base_of(located, section)
    seed = (located.data.get("tuning") or {}).get("random_seed")
    configurations = []
    for number, params in enumerate(given):
        where = (*place, number) if len(given) > 1 else place
        params = dict(params)
        if base is not None and "base" in params:
            raise located.error((*where, "base"), "the base is named twice, here and beside algorithm")
        # 2.x words name an approach always; bits of our own then say that the engine is to run in its place.
        own = [key for key in ("w_bits", "a_bits", "preset") if key in params]
        if base is not None and not (own and "approach" in section and next(iter(base)) not in section):
            params["base"] = base
        if seed is not None:
            params.setdefault("seed", seed)
        for key, value in params.items():
            try:
                options.check({key: value}, "cat")
            except CATError as error:
                raise located.error((*where, key), str(error)) from None
        try:
            options.check(params, "cat")
        except CATError as error:
            raise located.error(where, str(error)) from None
        configurations.append(params)
    tuning = located.data.get("tuning") or {}
    if tuning.get("strategy") == "layers" and (
        len(configurations) > 1 or options.has_choices(configurations[0]) or configurations[0].get("base")
    ):
        raise located.error(
            ("tuning", "strategy"),
            "strategy: layers chooses the bits of each layer from one configuration of the plugin's own engine; give each option "
            "one value and name no base, or leave the strategy out",
        )
    number = sum(map(options.combinations, configurations))
    if number > _MANY and "max_trials" not in {*tuning, *(tuning.get("exit_policy") or {})}:
        raise located.error(
            place,
            f"the options that hold lists make {number} combinations; say how many to try, with max_trials under "
            "tuning: exit_policy, or shorten the lists",
        )
    sizes = (section.get("calibration") or {}).get("sampling_size")
    return Recipe(
        path,
        configurations,
        _criterion(located),
        sampling_size=max(sizes) if isinstance(sizes, list) else sizes,
        performance_only=(tuning.get("exit_policy") or {}).get("performance_only", False),
        by_layers=tuning.get("strategy") == "layers",
    )
