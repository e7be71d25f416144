"""How an option is declared, and what follows from its declaration.

::

    @configuration
    class Example:
        bits: Bits = option(default=4, doc="Bits of the weights.", since="0.1")

Each option is declared once, in a class under :func:`configuration`: its type, with its range or its choices, its default,
one line of documentation and the release it came with.  The class checks its values when it is made, lists its options in
its docstring, and gives them (:func:`options_of`) to whatever repeats them elsewhere: the recipe's schema, the tables of the
documentation, ``cat-ptq recipe new``.  Pydantic checks; what it finds is said in one message of ours
(:mod:`cat_plugin.expectations`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import core_schema, to_jsonable_python

from cat_plugin.errors import CATValueError, OptionTypeError
from cat_plugin.expectations import first_sentence, values_in_words, worst_fault

__all__ = [
    "Bits",
    "Count",
    "Number",
    "OneOf",
    "Option",
    "Pattern",
    "Seed",
    "Share",
    "Steps",
    "Switch",
    "configuration",
    "json_schema",
    "option",
    "options_of",
    "plain_text",
    "with_parameters",
]

Class = TypeVar("Class", bound=type)

Bits = Annotated[int, Field(strict=True, ge=2, le=8)]
Count = Annotated[int, Field(strict=True, ge=1)]
Steps = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]
Pattern = Annotated[str, Field(strict=True, min_length=1)]


@dataclass(frozen=True)
class OneOf:
    """A word out of several: ``Annotated[str, OneOf(("fast", "best"))]``.

    Parameters
    ----------
    words : tuple of str
        The choices, in the order in which they are listed.
    """

    words: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.words))


def option(*, default: Any, doc: str, since: str) -> Any:
    """Declare an option: the value of an annotated name in a class under :func:`configuration`.

    Parameters
    ----------
    default : object
        The value where nothing is said.
    doc : str
        What it does, in reStructuredText; the first sentence stands alone in tables and recipes.
    since : str
        The release that brought it.
    """
    extra: dict[str, Any] = {"since": since}
    doc = inspect.cleandoc(doc)
    if isinstance(default, dict):
        return Field(default_factory=lambda: copy.deepcopy(default), description=doc, json_schema_extra=extra)
    return Field(default, description=doc, json_schema_extra=extra)


@dataclass(frozen=True)
class Option:
    """A declared option.

    Attributes
    ----------
    name : str
        What it is called.
    kind : type
        Its annotated type, with range or choices.
    default : object
        The value where nothing is said.
    doc : str
        What it does, in reStructuredText.
    since : str
        The release that brought it.
    """

    name: str
    kind: Any
    default: Any
    doc: str
    since: str

    @property
    def summary(self) -> str:
        """The first sentence of the documentation, as plain text."""
        return first_sentence(plain_text(self.doc))

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of its values."""
        return json_schema(self.kind)

    @property
    def plain_default(self) -> Any:
        """The default as JSON and YAML have it, anew each time."""
        return to_jsonable_python(self.default)

    @property
    def values(self) -> str:
        """What values there are, in words."""
        return values_in_words(self.schema)

    @property
    def is_sequence(self) -> bool:
        """Whether the value itself is a list."""
        return self.schema.get("type") == "array"


@functools.cache
def options_of(cls: type) -> dict[str, Option]:
    """The options that a class under :func:`configuration` declares, by name."""
    kinds = get_type_hints(cls, include_extras=True)
    fields: Mapping[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return {
        name: Option(
            name,
            kinds[name],
            field.get_default(call_default_factory=True),
            field.description,
            field.json_schema_extra["since"],
        )
        for name, field in fields.items()
    }


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def configuration(cls: Class) -> Class:
    """Make a frozen, checked dataclass of declared options, which raises errors of our own family.

    Raises
    ------
    OptionTypeError, CATValueError
        By the class, when it is made: on a value of the wrong type, a value out of range, or an unknown option.
    """
    made: Any = checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    check: Callable[..., None] = made.__init__

    @functools.wraps(check)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        names = list(options_of(made))[: len(args)]
        if len(names) < len(args) or not values.keys().isdisjoint(names):
            raise OptionTypeError(
                f"{made.__name__} was given an option twice, or too many; give each by its name"
            )
        try:
            check(self, **dict(zip(names, args, strict=True)), **values)
        except ValidationError as error:
            fault = worst_fault(error, json_schema(made), made.__name__, null="None")
            kind = OptionTypeError if fault.wrong_type else CATValueError
            raise kind(fault.message) from None

    made.__init__ = __init__
    made.__doc__ = with_parameters(inspect.cleandoc(cls.__doc__ or ""), options_of(made))
    return made  # type: ignore[no-any-return]


def with_parameters(doc: str, options: Mapping[str, Option]) -> str:
    """A docstring with numpydoc's section of parameters, before that of errors where there is one."""
    entries = ["Parameters", "----------"]
    for each in options.values():
        entries += [
            f"{each.name} : {values_in_words(each.schema, 'None')}, default={each.default!r}",
            *(f"    {line}" for line in each.doc.splitlines()),
        ]
    head, raises, tail = doc.partition("\n\nRaises\n")
    return "\n".join([head, "", *entries]) + raises + tail


@functools.cache
def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type; do not change it."""
    return TypeAdapter(kind).json_schema()


def plain_text(rst: str) -> str:
    """Documentation as a recipe and its tables have it: no markup but backticks, no module to read on in, null for None."""
    text = re.sub(r"\s\(:mod:[^)]*\)", "", rst)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))
