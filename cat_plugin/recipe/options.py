"""The words of a CAT configuration, the same for every host and every recipe.

A configuration is a plain mapping.  What it says about the correction, and about the rows that are kept for it, are the
options of :class:`~cat_plugin.recipe.correction.CorrectionOptions`; ``base`` names an algorithm of the host to correct; every
other key is an option of the plugin's own low-bit engine (:class:`cat_plugin.ptq.QuantSpec`), which runs when there is no
base.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cat_plugin.errors import RecipeError
from cat_plugin.expectations import nearest, worst_fault
from cat_plugin.options import options_of
from cat_plugin.ptq.presets import PRESETS
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe.correction import CorrectionOptions
from cat_plugin.recipe.schema import (
    Cat,
    cat_options,
    checker,
    correction_options,
    engine_options,
    is_choice,
)

if TYPE_CHECKING:
    from cat_plugin.cluster_affine import ClusterAffine

__all__ = [
    "CORRECTION",
    "TRANSFORMS",
    "by_name",
    "check",
    "check_keys",
    "combinations",
    "engine_defaults",
    "expand",
    "has_choices",
    "make_estimator",
    "make_spec",
    "nearest",
    "order",
    "quantization_key",
    "signature",
    "transform_spec",
    "with_defaults",
]

#: Keys about the correction, with their defaults.
CORRECTION: dict[str, Any] = {name: each.plain_default for name, each in correction_options().items()}
# Of these, what the quantized model depends on too.
_SHARED = ("seed", "logits", "class_axis", "holdout")
#: Options of the engine that also go over an algorithm of the host: what is done to the model before it is rounded.
TRANSFORMS = ("smoothing", "smoothing_strength", "smoothing_epochs", "rotation")
_BASE_COST = {"rtn": 0, "static_quant": 0, "hqq": 1}


def engine_defaults() -> dict[str, Any]:
    """The engine's options with their defaults, without those that serve the correction too."""
    return {name: each.plain_default for name, each in engine_options().items()}


def check_keys(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known, naming the nearest one that is."""
    choices = list(known)
    for key in given:
        if key not in choices:
            raise RecipeError(f"unknown key {key!r} in {where}; {nearest(key, choices)}")


def by_name(args: tuple[Any, ...], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options that were given by place or by name, all by name."""
    names = list(cat_options())[: len(args)]
    if len(names) < len(args) or not given.keys().isdisjoint(names):
        raise RecipeError(f"{where} was given an option twice, or too many; give each by its name")
    return {**dict(zip(names, args, strict=True)), **given}


def signature() -> inspect.Signature:
    """The signature of a method that takes every option."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter("self", kind),
            *(
                inspect.Parameter(name, kind, default=each.plain_default)
                for name, each in cat_options().items()
            ),
        ]
    )


def has_choices(params: Mapping[str, Any]) -> bool:
    """Whether any option holds a list of values to try."""
    return any(is_choice(key, value) for key, value in params.items())


def check(params: Mapping[str, Any], where: str = "cat") -> None:
    """Check every value of a configuration, and every item of the list-valued ones.

    Parameters
    ----------
    params : mapping
        A configuration; keys left out take their defaults.
    where : str
        What to call it in messages.

    Raises
    ------
    RecipeError
        On an unknown key, an empty list, a value out of range, or options that do not go together.
    """
    try:
        checker(Cat).validate_python(dict(params))
    except ValidationError as error:
        raise RecipeError(
            worst_fault(error, checker(Cat).json_schema(), where, inside=where).message
        ) from None
    if params.get("base") is None:
        return
    engine = engine_options()
    asked = [key for key in params if key in engine and key not in TRANSFORMS]
    if asked:
        raise RecipeError(
            f"{where} has both base and {', '.join(asked)}; base quantizes with an algorithm of the host, and "
            f"{asked[0]} is an option of the plugin's own engine. Remove one of the two."
        )
    if params.get("holdout", CORRECTION["holdout"]) != CORRECTION["holdout"]:
        raise RecipeError(
            f"{where} has both base and holdout; holdout keeps calibration rows from the plugin's own engine, and an "
            "algorithm of the host sees all of them. Remove one of the two."
        )


def with_defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every key, in a fixed order."""
    base = params.get("base")
    engine = engine_defaults()
    if base is not None:
        engine = {key: engine[key] for key in TRANSFORMS}
    defaults = {**engine, **CORRECTION, "base": None}
    return {key: params.get(key, default) for key, default in defaults.items()}


def expand(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cross product of the list-valued options, in the order in which the values were given.

    Parameters
    ----------
    params : mapping
        A checked configuration. A list under ``base`` holds bases; what lists these hold themselves only
        the host knows.

    Returns
    -------
    list of dict
    """
    choices = [list(value) if is_choice(key, value) else [value] for key, value in params.items()]
    return [dict(zip(params, values, strict=True)) for values in product(*choices)]


def combinations(params: Mapping[str, Any]) -> int:
    """How many configurations :func:`expand` would return."""
    return math.prod(len(value) for key, value in params.items() if is_choice(key, value))


def order(candidates: list[dict[str, Any]]) -> list[int]:
    """In which order to try configurations: each once, the cheap ones first.

    A faster preset or host algorithm comes before a slower one; configurations that share their
    quantization stand together, so that it is done once, and among these few clusters come first.
    Otherwise the given order is kept.

    Parameters
    ----------
    candidates : list of dict
        Configurations without lists, ``base`` as a mapping.

    Returns
    -------
    list of int
        Indices into `candidates`, without those that repeat an earlier one.
    """
    groups: dict[str, int] = {}
    distinct: list[int] = []
    for number, candidate in enumerate(candidates):
        groups.setdefault(quantization_key(candidate), len(groups))
        if all(with_defaults(candidate) != with_defaults(candidates[other]) for other in distinct):
            distinct.append(number)

    def cost(number: int) -> tuple[int, int, int]:
        candidate = candidates[number]
        base = candidate.get("base")
        if base is not None:
            effort = _BASE_COST.get(next(iter(base)), 2)
        else:
            effort = list(PRESETS).index(candidate.get("preset", engine_options()["preset"].default))
        return (
            effort,
            groups[quantization_key(candidate)],
            candidate.get("num_clusters", CORRECTION["num_clusters"]),
        )

    return sorted(distinct, key=cost)


def quantization_key(params: Mapping[str, Any]) -> str:
    """What of a configuration decides the quantized model, as a string that is equal when that is."""
    full = with_defaults(params)
    deciding = {k: v for k, v in full.items() if k in _SHARED or k not in CORRECTION}
    return json.dumps(deciding, sort_keys=True, default=str)


def make_spec(params: Mapping[str, Any]) -> QuantSpec:
    """The engine's specification of a configuration without lists."""
    return QuantSpec.from_dict({k: v for k, v in params.items() if k in options_of(QuantSpec)})


def transform_spec(params: Mapping[str, Any], bits: int, group: int | None) -> QuantSpec | None:
    """What is to be done to the model before an algorithm of the host rounds its weights; None if nothing is."""
    chosen = {key: params[key] for key in TRANSFORMS if key in params}
    if chosen.get("smoothing") is None and chosen.get("rotation") is None:
        return None
    return QuantSpec(w_bits=bits, weight_only=True, weight_groups=group, seed=params.get("seed", 0), **chosen)


def make_estimator(params: Mapping[str, Any]) -> ClusterAffine:
    """The estimator of a configuration without lists."""
    return CorrectionOptions(**{k: v for k, v in params.items() if k in CORRECTION}).estimator()
