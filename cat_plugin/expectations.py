"""What was expected in the place of a value, in words: one message out of what pydantic found and a JSON Schema."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

__all__ = [
    "LIST",
    "MAPPING",
    "VALUE",
    "Fault",
    "Place",
    "first_sentence",
    "nearest",
    "short",
    "values_in_words",
    "worst_fault",
]

Place = tuple[str | int, ...]

#: Tags of the members of a union; pydantic puts them among the keys where it says what is wrong.
VALUE, LIST, MAPPING = "<value>", "<list>", "<mapping>"

_KINDS = {"array": "a list", "object": "a mapping", "integer": "a whole number", "number": "a number",
          "string": "a word", "boolean": "true or false"}  # fmt: skip
_SEVERAL = {"string": "a list of words", "integer": "a list of whole numbers"}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a value.

    Attributes
    ----------
    place : tuple of str and int
        The keys and indices that lead to it.
    message : str
        What was given, and what was expected.
    wrong_type : bool
        Whether no value of this type could do.
    """

    place: Place
    message: str
    wrong_type: bool


def short(value: Any) -> str:
    """A value for a message, shortened when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: object, known: Iterable[str]) -> str:
    """A sentence naming the known word closest to `word`, or all of them when none is close."""
    choices = list(known)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


def values_in_words(schema: dict[str, Any], null: str = "null") -> str:
    """What values a JSON Schema allows: "2 to 8", "fast, balanced, best", "true or false".

    Parameters
    ----------
    schema : dict
        Of one option.
    null : str
        The word for no value: ``null`` in a recipe, ``None`` in Python.
    """
    words = []
    alternatives = list(_alternatives(schema, schema))
    for each in alternatives:
        kind = each.get("type", "")
        if "enum" in each:
            words.append(", ".join(each["enum"]))
        elif kind == "array":
            words.append(_SEVERAL.get(each.get("items", {}).get("type"), "a list"))
        elif kind == "boolean":
            words.append("true, false")
        elif kind != "null":
            words.append(_span(each) or _KINDS.get(kind, "anything"))
    if any(each.get("type") == "null" for each in alternatives):
        words.append(null)
    return ", or ".join(words)


def worst_fault(
    error: ValidationError, schema: dict[str, Any], whole: str, inside: str = "", null: str = "null"
) -> Fault:
    """The fault to tell the user of, out of all that pydantic found: the outermost, an unknown key before others.

    Parameters
    ----------
    error : ValidationError
        What pydantic found.
    schema : dict
        The JSON Schema of what was checked.
    whole : str
        What to call that.
    inside : str
        What to put before the names of its parts.
    null : str
        The word for no value.
    """
    found = [(_place(each["loc"]), each) for each in error.errors(include_url=False)]
    place, first = min(found, key=lambda each: (len(each[0]), each[1]["type"] not in _UNKNOWN))
    kind, value = first["type"], first["input"]

    def name(path: Place) -> str:
        return ".".join([inside, *map(str, path)] if inside else map(str, path)) or whole

    if kind in _UNKNOWN:
        known = [key for part in _at(schema, place[:-1]) for key in part.get("properties", ())]
        owner = name(place[:-1]) if place[:-1] else whole
        return Fault(place, f"unknown key {place[-1]!r} in {owner}; {nearest(place[-1], known)}", True)
    if place and place[-1] == "[key]":
        return Fault(place[:-1], f"{name(place[:-2])} has the key {value!r}; expected a word", True)
    parts = _at(schema, place)
    if kind == "literal_error":
        choices = [choice for part in parts for choice in part.get("enum", ())]
        return Fault(place, f"{name(place)} is {short(value)}; expected one of {', '.join(choices)}", False)
    if kind in _RANGE:
        span = next(filter(None, map(_span, parts)), "a finite number")
        return Fault(place, f"{name(place)} is {short(value)}; expected {span}{_about(schema, place)}", False)
    if kind == "too_short" and isinstance(value, list):
        return Fault(
            place,
            f"{name(place)} is empty; an empty list says nothing, give at least one value",
            False,
        )
    if kind in ("too_short", "string_too_short"):
        return Fault(place, f"{name(place)} is empty; give at least one value", False)
    if kind == "too_long":
        return Fault(place, f"{name(place)} names {len(value)} algorithms; expected one", False)
    if kind.endswith("_type"):
        kinds = dict.fromkeys(null if k == "null" else _KINDS[k] for k in map(_kind, parts) if k)
        return Fault(place, f"{name(place)} is {short(value)}; expected {' or '.join(kinds)}", True)
    if kind == "value_error":
        return Fault(place, str(first["ctx"]["error"]), False)
    return Fault(place, f"{name(place)}: {first['msg']}", True)


def _place(location: tuple[str | int, ...]) -> Place:
    return tuple(part for part in location if part not in (VALUE, LIST, MAPPING))


def _kind(schema: dict[str, Any]) -> str | None:
    return "string" if "enum" in schema else schema.get("type")


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _span(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    below = schema.get("exclusiveMaximum")
    if least is None:
        return ""
    if most is not None:
        return f"{_plain(least)} to {_plain(most)}"
    return f"{_plain(least)} to below {_plain(below)}" if below is not None else f"{_plain(least)} or more"


def _alternatives(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The members of a union, or the schema itself; what is defined elsewhere in its place."""
    if "$ref" in schema:
        yield from _alternatives(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
        return
    members = schema.get("anyOf") or schema.get("oneOf")
    if members is None:
        yield schema
    else:
        for each in members:
            yield from _alternatives(each, root)


def _about(root: dict[str, Any], place: Place) -> str:
    """In brackets, the first sentence that is said about the option in this place."""
    for end in range(len(place), 0, -1):
        for schema in _at(root, place[: end - 1]):
            text = schema.get("properties", {}).get(place[end - 1], {}).get("description", "")
            if text:
                return f" ({first_sentence(text)})"
    return ""


def first_sentence(text: str) -> str:
    """What stands before the first stop, semicolon or colon."""
    return re.split(r"[.;:](?:\s|$)", text, maxsplit=1)[0]


def _at(root: dict[str, Any], place: Place) -> list[dict[str, Any]]:
    """Every schema that a value in this place may follow."""
    here = list(_alternatives(root, root))
    for part in place:
        below: list[Any] = []
        for schema in here:
            if part in schema.get("properties", {}):
                below.append(schema["properties"][part])
            elif isinstance(part, int) and "items" in schema:
                below.append(schema["items"])
            elif isinstance(schema.get("additionalProperties"), dict):
                below.append(schema["additionalProperties"])
        here = [each for schema in below for each in _alternatives(schema, root)]
    return here
