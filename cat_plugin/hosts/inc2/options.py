"""What a user of Neural Compressor 2.x says about CAT: ``recipes={"cat": True, "cat_args": {...}}``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cat_plugin.errors import RecipeError
from cat_plugin.recipe import options

__all__ = ["candidates", "plain", "take"]


def candidates(args: Any) -> tuple[list[dict[str, Any]], bool]:
    """Every configuration that ``cat_args`` describes, the cheap ones first.

    Parameters
    ----------
    args : mapping, list of mapping or None
        CAT's options; values may be lists.

    Returns
    -------
    candidates : list of dict
        Without lists.
    engine : bool
        Whether they ask for the low-bit engine in place of the host's int8.

    Raises
    ------
    RecipeError
        On options that are unknown, out of range, or do not go together.
    """
    found: list[dict[str, Any]] = []
    engine = options.engine_defaults()
    for params in args if isinstance(args, list) else [args or {}]:
        if not isinstance(params, Mapping):
            raise RecipeError(f"cat_args is a {type(params).__name__}; expected a mapping of CAT's options")
        if params.get("base") is not None:
            raise RecipeError(
                "cat_args has a base; in the 2.x API the host's own approach is what CAT corrects. Remove base, or "
                "give w_bits and a_bits to run the low-bit engine instead"
            )
        options.check(params, "cat_args")
        expanded = options.expand(params)
        found += [expanded[number] for number in options.order(expanded)]
    asked = {any(key in params for key in engine) for params in found}
    if len(asked) > 1:
        raise RecipeError(
            "some of cat_args have options of the low-bit engine and some have not; give all of them w_bits, or none"
        )
    by_engine = asked.pop()
    if not by_engine and any("holdout" in params for params in found):
        raise RecipeError(
            "cat_args has holdout, which keeps calibration rows from the low-bit engine, and the host's int8 sees all of "
            "them; remove it, or give w_bits and a_bits to run the engine"
        )
    return found, by_engine


def plain(value: Any) -> Any:
    """Ordinary dicts and lists out of the host's attribute dicts."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def take(recipes: Mapping[str, Any]) -> dict[str, Any]:
    """CAT's part of a mapping of recipes, checked."""
    taken: dict[str, Any] = {}
    if "cat" in recipes:
        if not isinstance(recipes["cat"], bool):
            raise RecipeError(
                f"recipes['cat'] is {recipes['cat']!r}; expected True or False (options go to cat_args)"
            )
        taken["cat"] = recipes["cat"]
    if recipes.get("cat_args") is not None:
        if taken.get("cat") is False:
            raise RecipeError("recipes has cat_args and cat is False; remove one of the two")
        candidates(plain(recipes["cat_args"]))
        taken["cat_args"] = recipes["cat_args"]
    return taken
