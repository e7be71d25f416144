"""The words of a CAT configuration, one table for every host and every recipe.

A configuration is a plain mapping. What it says about the correction, and about the rows that are kept
for it, is in :data:`CORRECTION`; ``base``
names an algorithm of the host to correct; every other key is an option of the plugin's own low-bit
engine (a field of :class:`cat_plugin.ptq.QuantSpec`), which runs when there is no base.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import RecipeError

if TYPE_CHECKING:
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.ptq import QuantSpec

__all__ = [
    "CORRECTION",
    "MODES",
    "check",
    "check_keys",
    "engine_defaults",
    "expand",
    "has_choices",
    "make_estimator",
    "make_spec",
    "nearest",
    "order",
    "quantization_key",
    "with_defaults",
]

#: Keys about the correction, with their defaults; the estimator's names differ for three of them.
CORRECTION: dict[str, Any] = {
    "num_clusters": 64,
    "alpha": 0.4,
    "pca_dim": None,
    "mode": "auto",
    "seed": 0,
    "holdout": 0.25,
}
# Of these, what the quantized model depends on too.
_SHARED = ("seed", "holdout")
_ESTIMATOR_NAMES = {
    "num_clusters": "n_clusters",
    "alpha": "alpha",
    "pca_dim": "n_components",
    "mode": "mode",
    "seed": "random_state",
}
MODES = ("auto", "paper", "diagonal", "lowrank", "full")
_PRESET_COST = {"fast": 0, "balanced": 1, "best": 2}
_BASE_COST = {"rtn": 0, "static_quant": 0, "hqq": 1}


def engine_defaults() -> dict[str, Any]:
    """The engine's options with their defaults, without ``seed``, which serves the correction too."""
    from cat_plugin.ptq.spec import QuantSpec

    defaults = QuantSpec().to_dict()
    defaults.pop("seed", None)
    return defaults


def nearest(word: object, known: Iterable[str]) -> str:
    """A sentence naming the known word closest to `word`, or all of them when none is close."""
    choices = list(known)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


def check_keys(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known, naming the nearest one that is."""
    choices = list(known)
    for key in given:
        if key not in choices:
            raise RecipeError(f"unknown key {key!r} in {where}; {nearest(key, choices)}")


@functools.cache
def _sequences() -> frozenset[str]:
    """Options whose own value is a list; for them only a list of lists is a choice between values."""
    from cat_plugin.ptq.spec import QuantSpec

    return frozenset(
        f.name
        for f in dataclasses.fields(QuantSpec)
        if any(word in str(f.type).lower() for word in ("tuple", "list", "sequence"))
    )


def _is_choice(key: str, value: Any) -> bool:
    """Whether a value is a list of values to try."""
    if not isinstance(value, (list, tuple)):
        return False
    return key not in _sequences() or (bool(value) and all(isinstance(item, (list, tuple)) for item in value))


def has_choices(params: Mapping[str, Any]) -> bool:
    """Whether any option holds a list of values to try."""
    return any(_is_choice(key, value) for key, value in params.items())


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
        On an unknown key, an empty list, or a value out of range.
    """
    engine = engine_defaults()
    check_keys(params, [*engine, *CORRECTION, "base"], where)
    for key, value in params.items():
        if _is_choice(key, value) and not value:
            raise RecipeError(f"{where}.{key} is an empty list; give one value, or a list of values to try")
    if params.get("base") is not None:
        asked = [key for key in engine if key in params and params[key] != engine[key]]
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
    for key, choices in (
        (key, value if _is_choice(key, value) else [value]) for key, value in params.items()
    ):
        for value in choices:
            if key in CORRECTION:
                _check_correction(key, value, where)
            elif key != "base":
                _check_engine(key, value, where)


def _check_correction(key: str, value: Any, where: str) -> None:
    def refuse(expected: str) -> None:
        raise RecipeError(f"{where}.{key} is {value!r}; expected {expected}")

    whole = isinstance(value, int) and not isinstance(value, bool)
    if key == "num_clusters" and not (whole and value >= 1):
        refuse("a whole number of clusters, 1 or more")
    if key == "pca_dim" and value is not None and not (whole and value >= 1):
        refuse("a whole number of principal components, or null for no PCA")
    if key == "seed" and not (whole and 0 <= value < 2**32):
        refuse("a whole number from 0 to 2**32 - 1")
    if key == "alpha" and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1
    ):
        refuse("a number from 0 (no correction) to 1 (the whole of it)")
    if key == "holdout" and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1
    ):
        refuse("a share of the calibration rows from 0 (none) to below 1")
    if key == "mode" and value not in MODES:
        refuse(f"one of {', '.join(MODES)}")


def _check_engine(key: str, value: Any, where: str) -> None:
    from cat_plugin.errors import CATError
    from cat_plugin.ptq.spec import QuantSpec

    try:
        QuantSpec.from_dict({key: value})
    except (CATError, TypeError, AttributeError) as error:
        raise RecipeError(f"{where}.{key}: {error}") from None


def with_defaults(params: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every key, in a fixed order."""
    base = params.get("base")
    defaults = {**({} if base is not None else engine_defaults()), **CORRECTION, "base": None}
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
    choices = [list(value) if _is_choice(key, value) else [value] for key, value in params.items()]
    return [dict(zip(params, values, strict=True)) for values in product(*choices)]


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
            effort = _PRESET_COST[candidate.get("preset", "balanced")]
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
    from cat_plugin.ptq.spec import QuantSpec

    names = {f.name for f in dataclasses.fields(QuantSpec)}
    return QuantSpec.from_dict({k: v for k, v in params.items() if k in names})


def make_estimator(params: Mapping[str, Any]) -> ClusterAffine:
    """The estimator of a configuration without lists."""
    from cat_plugin.cluster_affine import ClusterAffine

    values = {**CORRECTION, **{k: v for k, v in params.items() if k in CORRECTION}}
    return ClusterAffine(**{_ESTIMATOR_NAMES[k]: v for k, v in values.items() if k in _ESTIMATOR_NAMES})
