"""The YAML files of Neural Compressor 2.4 to 2.6: ``algorithm: cat`` and ``recipes: {cat: true}`` in their schema.

What is put in the place of the host's; :mod:`cat_plugin.hosts.inc2.patches` does so and undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError, RecipeError
from cat_plugin.hosts.inc2.options import take
from cat_plugin.recipe import options

if TYPE_CHECKING:
    from cat_plugin.hosts._patching import Patches

__all__ = ["extend", "read_cfg", "restore"]


def _fold_algorithm(section: dict[str, Any]) -> dict[str, Any]:
    """``algorithm: cat`` of a validated YAML section, as recipes."""
    algorithm = section.pop("algorithm", None)
    if algorithm is None:
        return section
    args: Any = None
    name: Any = algorithm
    if isinstance(algorithm, Mapping):
        if "name" in algorithm:
            name, args = algorithm["name"], {k: v for k, v in algorithm.items() if k != "name"}
        elif len(algorithm) == 1:
            name, args = next(iter(algorithm.items()))
    if name != "cat":
        raise RecipeError(f"unknown algorithm {name!r} in quantization; {options.nearest(name, ['cat'])}")
    recipes = dict(section.get("recipes") or {})
    recipes["cat"] = True
    if args:
        recipes["cat_args"] = args
    section["recipes"] = recipes
    take(recipes)
    return section


def read_cfg(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's reader of a file, so that what it says of CAT's keys becomes one clear error."""

    def read(self: Any, cfg_fname: Any) -> Any:
        try:
            return original(self, cfg_fname)
        except RuntimeError as error:
            # The host says only that the file is not correct; what CAT said about it lies underneath.
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, CATError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise

    return read


class _Schema:
    """The host's YAML schema, with CAT's words in the section ``quantization``."""

    def __init__(self) -> None:
        self._owner: dict[Any, Any] | None = None
        self._key: Any = None
        self._before: Any = None

    def extend(self, schema: Any, patches: Patches) -> None:
        """Put a section that also knows CAT in the place of the host's."""
        from schema import And, Optional, Use  # type: ignore[import-not-found]

        owner = schema._schema
        key = next((key for key in owner if getattr(key, "schema", key) == "quantization"), None)
        section = owner.get(key)
        inner = (
            next((k for k in section if getattr(k, "schema", k) == "recipes"), None)
            if isinstance(section, dict)
            else None
        )
        if inner is None:
            patches.refused["conf.config.schema"] = "it has no section quantization with recipes"
            return
        words = {**section[inner], Optional("cat"): bool, Optional("cat_args"): object}
        extended = {**section, inner: words, Optional("algorithm"): object}
        self._owner, self._key, self._before = owner, key, section
        owner[key] = And(extended, Use(_fold_algorithm))

    def restore(self) -> None:
        """Undo."""
        if self._owner is not None:
            self._owner[self._key] = self._before
            self._owner = None


_schema = _Schema()
extend = _schema.extend
restore = _schema.restore
