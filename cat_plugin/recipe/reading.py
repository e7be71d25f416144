"""Read a recipe file: YAML by the safe loader, checked against its form, errors by line and column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cat_plugin.errors import RecipeError
from cat_plugin.expectations import Place, short, worst_fault
from cat_plugin.files import read_limited
from cat_plugin.recipe.schema import RecipeFile, checker, recipe_schema

__all__ = ["Located", "read"]

# Far above any recipe and far below what a small file of aliases, brackets or digits can blow up to.
_LARGEST, _DEEPEST, _MOST, _LONGEST = 2**18, 32, 20_000, 10_000
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class Located:
    """The content of a file, and where each part of it stands.

    Attributes
    ----------
    data : object
        Plain Python values.
    name : str
        The file's name, for messages.
    """

    def __init__(self, data: Any, name: str, places: dict[Place, tuple[int, int]]) -> None:
        self.data = data
        self.name = name
        self._places = places

    def where(self, path: Place) -> str:
        """``file:line:column`` of a part, or of the closest part around it."""
        while path and path not in self._places:
            path = path[:-1]
        line, column = self._places.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"

    def error(self, path: Place, message: str) -> RecipeError:
        """An error that says where."""
        return RecipeError(f"{self.where(path)}: {message}")


class _Loader(yaml.SafeLoader):
    """The safe loader with a limit on nesting, before it reads on: each level costs it time for each word."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.depth == _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {_DEEPEST} levels", problem_mark=mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _walk(
    node: yaml.Node, path: Place, name: str, left: Iterator[int]
) -> Iterator[tuple[Place, tuple[int, int]]]:
    """Where each value stands; what an alias stands for is counted and walked each time."""
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    if next(left, None) is None or len(path) > _DEEPEST:
        raise RecipeError(
            f"{name}:{line}:{column}: too many values, or one that refers to itself; a recipe is a plain tree of at "
            f"most {_MOST} values, with what stands for another counted in full"
        )
    if path == ():
        yield path, (line, column)
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            mark = key.start_mark
            place = (mark.line + 1, mark.column + 1)
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                raise RecipeError(f"{name}:{place[0]}:{place[1]}: a key must be a word")
            if key.value in seen:
                raise RecipeError(
                    f"{name}:{place[0]}:{place[1]}: the key {short(key.value)} stands here twice"
                )
            seen.add(key.value)
            yield (*path, key.value), place
            yield from _walk(value, (*path, key.value), name, left)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*path, number), (item.start_mark.line + 1, item.start_mark.column + 1)
            yield from _walk(item, (*path, number), name, left)
    elif len(node.value) > _LONGEST:
        raise RecipeError(
            f"{name}:{line}:{column}: a value of {len(node.value)} characters; expected at most {_LONGEST}"
        )


def _parse(text: str, name: str) -> Located:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise RecipeError(f"{name}:1:1: the file is empty; a recipe needs at least 'algorithm: cat'")
            places = dict(_walk(node, (), name, iter(range(_MOST))))
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{mark.line + 1}:{mark.column + 1}" if mark is not None else "1:1"
        raise RecipeError(f"{name}:{at}: not valid YAML: {error.problem or error.context}") from None
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        # A character that YAML forbids, a date that there is not, an empty number, one of thousands of digits.
        reason = " ".join(str(error).split())
        raise RecipeError(f"{name}:1:1: not valid YAML: {reason:.200}") from None
    located = Located(data, name, places)
    _check_numbers(data, (), located)
    return located


def _check_numbers(value: Any, path: Place, located: Located) -> None:
    """Refuse numbers that no option can have and that arithmetic fails on."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, (*path, key), located)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_numbers(item, (*path, number), located)
    elif (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and abs(value) >= 2**63
    ):
        raise located.error(path, f"{_at(path)} is {short(value)}; expected a finite number below 2**63")


def _at(path: Place) -> str:
    return ".".join(str(part) for part in path) or "the recipe"


def read(path: str | Path) -> Located:
    """Read and check a recipe.

    Parameters
    ----------
    path : str or pathlib.Path
        A YAML (or JSON) file.

    Returns
    -------
    Located

    Raises
    ------
    RecipeError
        Naming the file, the line, the column, and for an unknown key the nearest known one.
    """
    path = Path(path)
    raw = read_limited(path, _LARGEST, RecipeError, "give a recipe, a YAML file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    located = _parse(text, path.name)
    try:
        checker(RecipeFile).validate_python(located.data)
    except ValidationError as error:
        fault = worst_fault(error, recipe_schema(), "the recipe")
        raise located.error(fault.place, fault.message) from None
    return located
