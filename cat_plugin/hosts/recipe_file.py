"""Read a recipe file: YAML by the safe loader, checked against the schema, errors by line and column."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cat_plugin.errors import CATValueError, RecipeError
from cat_plugin.hosts.options import engine_defaults, nearest

__all__ = ["Located", "read", "schema"]

_Place = tuple[str | int, ...]


class Located:
    """The content of a file, and where each part of it stands.

    Attributes
    ----------
    data : object
        Plain Python values.
    name : str
        The file's name, for messages.
    """

    def __init__(self, data: Any, name: str, places: dict[_Place, tuple[int, int]]) -> None:
        self.data = data
        self.name = name
        self._places = places

    def where(self, path: _Place) -> str:
        """``file:line:column`` of a part, or of the closest part around it."""
        while path and path not in self._places:
            path = path[:-1]
        line, column = self._places.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"

    def error(self, path: _Place, message: str) -> RecipeError:
        """An error that says where."""
        return RecipeError(f"{self.where(path)}: {message}")


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, with the options of the engine as it is now."""
    loaded: dict[str, Any] = json.loads(files(__package__).joinpath("recipe.schema.json").read_text("utf-8"))
    options = loaded["$defs"]["cat"]["properties"]
    for name in engine_defaults():
        options.setdefault(name, {})
    return loaded


def _walk(node: yaml.Node, path: _Place, name: str) -> Iterator[tuple[_Place, tuple[int, int]]]:
    if path == ():
        yield path, (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            mark = key.start_mark
            place = (mark.line + 1, mark.column + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{name}:{place[0]}:{place[1]}: a key must be a word")
            if key.value in seen:
                raise RecipeError(f"{name}:{place[0]}:{place[1]}: the key {key.value!r} stands here twice")
            seen.add(key.value)
            yield (*path, key.value), place
            yield from _walk(value, (*path, key.value), name)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*path, number), (item.start_mark.line + 1, item.start_mark.column + 1)
            yield from _walk(item, (*path, number), name)


def _parse(text: str, name: str) -> Located:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name}:1:1: the file is empty; a recipe needs at least 'algorithm: cat'")
        places = dict(_walk(node, (), name))
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{mark.line + 1}:{mark.column + 1}" if mark is not None else "1:1"
        raise RecipeError(f"{name}:{at}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise RecipeError(
            f"{name}:1:1: the file refers to itself; a recipe is a plain tree of values"
        ) from None
    finally:
        loader.dispose()
    return Located(data, name, places)


def _at(path: _Place) -> str:
    return ".".join(str(part) for part in path) or "the recipe"


def _message(error: Any, located: Located) -> RecipeError:
    path: _Place = tuple(error.absolute_path)
    where = _at(path)
    rule, value = error.validator, error.instance
    if rule == "additionalProperties":
        known = list(error.schema["properties"])
        key = next(key for key in value if key not in known)
        return located.error((*path, key), f"unknown key {key!r} in {where}; {nearest(key, known)}")
    if rule == "type":
        names = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        words = {"array": "a list", "object": "a mapping", "integer": "a whole number", "number": "a number",
                 "string": "a word", "null": "null", "boolean": "true or false"}  # fmt: skip
        return located.error(
            path, f"{where} is {value!r}; expected {' or '.join(words[name] for name in names)}"
        )
    if rule == "enum":
        return located.error(path, f"{where} is {value!r}; {nearest(value, map(str, error.validator_value))}")
    if rule in ("minimum", "maximum"):
        least, most = error.schema.get("minimum"), error.schema.get("maximum")
        span = f"{least} to {most}" if least is not None and most is not None else f"{least} or more"
        return located.error(path, f"{where} is {value!r}; expected {span}")
    if rule in ("minItems", "minProperties"):
        return located.error(path, f"{where} is empty; give at least one value")
    if rule == "maxProperties":
        return located.error(path, f"{where} names {len(value)} algorithms; expected one")
    return located.error(path, f"{where}: {error.message}")


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
    from jsonschema import Draft202012Validator

    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise CATValueError(f"the recipe {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    located = _parse(text, path.name)
    errors = Draft202012Validator(schema()).iter_errors(located.data)
    first = min(errors, key=lambda error: len(error.absolute_path), default=None)
    if first is not None:
        raise _message(first, located)
    return located
