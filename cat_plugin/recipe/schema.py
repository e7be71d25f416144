"""The form of a recipe file: its sections as types, which pydantic checks and from which the JSON Schema is made.

What stands under ``cat:`` is not listed here: it is every option that :class:`~cat_plugin.ptq.QuantSpec` and
:class:`~cat_plugin.recipe.correction.CorrectionOptions` declare, each as one value or as a list of values to try.

The schema for editors lies beside this file; ``python -m cat_plugin.recipe.schema`` writes it anew.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from pydantic_core import CoreSchema
from pydantic_core.core_schema import tagged_union_schema
from typing_extensions import TypedDict

from cat_plugin.expectations import LIST, MAPPING, VALUE
from cat_plugin.options import Count, Number, Option, Seed, Switch, options_of, plain_text
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe.correction import CorrectionOptions

__all__ = [
    "BASE",
    "SCHEMA_FILE",
    "AccuracyCriterion",
    "Calibration",
    "Cat",
    "ExitPolicy",
    "Model",
    "Quantization",
    "RecipeFile",
    "Recipes",
    "Tuning",
    "cat_options",
    "checker",
    "correction_options",
    "engine_options",
    "is_choice",
    "recipe_schema",
    "schema_text",
]

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")

_CLOSED = ConfigDict(extra="forbid")
_HOST = "Parameters of an algorithm of the host, by the names of its configuration class."


def engine_options() -> Mapping[str, Option]:
    """The engine's options, without those that serve the correction too (``seed``, ``logits``, ``class_axis``)."""
    shared = correction_options()
    return {name: each for name, each in options_of(QuantSpec).items() if name not in shared}


def correction_options() -> Mapping[str, Option]:
    """The options of the correction, and of the rows that are kept for it."""
    return options_of(CorrectionOptions)


def is_choice(name: str, value: Any) -> bool:
    """Whether a value is a list of values to try; for an option that is a list itself, a list of lists."""
    if not isinstance(value, (list, tuple)):
        return False
    declared = engine_options().get(name)
    if declared is None or not declared.is_sequence:
        return True
    return bool(value) and all(isinstance(item, (list, tuple)) for item in value)


class _ByKind:
    """A union whose member is chosen by the kind of value: a list, a mapping, or anything else.

    A message then speaks of the one member that was meant, not of all that it is not.
    """

    def __init__(self, **members: Any) -> None:
        tags = {"value": VALUE, "list": LIST, "mapping": MAPPING}
        self.members = {tags[name]: member for name, member in members.items()}

    def tag(self, value: Any) -> str:
        """Which member a value is meant for; the first where there is none of its kind."""
        found = LIST if isinstance(value, (list, tuple)) else MAPPING if isinstance(value, Mapping) else VALUE
        return found if found in self.members else next(iter(self.members))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return tagged_union_schema(
            {tag: handler.generate_schema(member) for tag, member in self.members.items()}, self.tag
        )


class _OrList(_ByKind):
    """The value of an option, or a list of values to try."""

    def __init__(self, option: Option) -> None:
        several: Any = list[option.kind]  # type: ignore[name-defined]
        super().__init__(value=option.kind, list=Annotated[several, Field(min_length=1)])
        self.name = option.name

    def tag(self, value: Any) -> str:
        """Which of the two a value is."""
        return LIST if is_choice(self.name, value) else VALUE


_OneAlgorithm = Annotated[dict[str, Any], Field(min_length=1, max_length=1)]
_Word = Annotated[str, Field(strict=True)]
_OneBase = Annotated[Any, _ByKind(mapping=_OneAlgorithm, value=_Word | None)]
BASE = Option(
    "base",
    Annotated[
        Any,
        _ByKind(
            mapping=_OneAlgorithm, value=_Word | None, list=Annotated[list[_OneBase], Field(min_length=1)]
        ),
    ],
    None,
    "An algorithm of the host to correct, such as ``{rtn: {bits: 4}}``; null quantizes by the plugin's own engine.",
    "0.1",
)


@functools.cache
def cat_options() -> dict[str, Option]:
    """Every option that stands under ``cat:``, those that are given most often first."""
    engine, correction = dict(engine_options()), correction_options()
    leading = {name: engine.pop(name) for name in ("w_bits", "a_bits", "preset")}
    return {**leading, **correction, BASE.name: BASE, **engine}


def _section(options: Mapping[str, Option]) -> Any:
    fields: dict[str, Any] = {}
    for name, each in options.items():
        extra = {"default": each.plain_default, "since": each.since}
        described = Field(description=plain_text(each.doc), json_schema_extra=extra)
        fields[name] = (
            Annotated[each.kind, described] if each is BASE else Annotated[Any, _OrList(each), described]
        )
    return with_config(_CLOSED)(TypedDict("Cat", fields, total=False))  # type: ignore[operator]


Cat: Any = _section(cat_options())
_Cats = Annotated[Any, _ByKind(mapping=Cat | None, list=Annotated[list[Cat], Field(min_length=1)])]
_Host = Annotated[dict[str, Any] | None, Field(description=_HOST)]
_Algorithm = Annotated[
    Any,
    _ByKind(value=_Word, mapping=Annotated[dict[str, Any], Field(min_length=1)]),
    Field(description="cat, or {cat: {options}}, or {name: cat, options}."),
]
_Amount = Annotated[Number, Field(ge=0)]
# The schema says to editors that a share is below 1; load_recipe refuses others after it has looked for duplicate keys.
_Relative = Annotated[Number, Field(ge=0, json_schema_extra={"exclusiveMaximum": 1})]


@with_config(_CLOSED)
class AccuracyCriterion(TypedDict, total=False):
    """How much worse than full precision is good enough.

    ::

        accuracy_criterion: {relative: 0.01}
    """

    relative: Annotated[
        _Relative, Field(description="The share of the full-precision score that may be lost: 0.01 is 1 %.")
    ]
    absolute: Annotated[_Amount, Field(description="What may be lost in the score's own unit.")]
    higher_is_better: Annotated[
        Switch, Field(description="Whether a score is to be large; false for a loss.")
    ]


@with_config(_CLOSED)
class ExitPolicy(TypedDict, total=False):
    """When to stop trying.

    ::

        exit_policy: {max_trials: 10, timeout: 3600}
    """

    timeout: Annotated[
        _Amount, Field(description="Seconds after which no further trial starts; 0 for no limit.")
    ]
    max_trials: Annotated[Count, Field(description="Trials at most.")]
    performance_only: Annotated[Switch, Field(description="Quantize once, without evaluating.")]


@with_config(_CLOSED)
class Tuning(TypedDict, total=False):
    """What a tuning run aims at.

    ::

        tuning:
          accuracy_criterion: {relative: 0.01}
          exit_policy: {max_trials: 10, timeout: 0}
          try_all: true
    """

    accuracy_criterion: AccuracyCriterion
    exit_policy: ExitPolicy
    tolerable_loss: Annotated[_Relative, Field(description="3.x's word for accuracy_criterion.relative.")]
    max_trials: Annotated[Count, Field(description="3.x's word for exit_policy.max_trials.")]
    timeout: Annotated[_Amount, Field(description="3.x's word for exit_policy.timeout.")]
    strategy: Annotated[
        Literal["grid", "layers"],
        Field(
            description="grid tries every combination of the options that hold lists; layers begins with the bits given and "
            "raises those layers to 8 that do the most damage for their bytes, until a trial is good enough."
        ),
    ]
    random_seed: Annotated[Seed, Field(description="The seed, unless cat has its own.")]
    try_all: Annotated[
        Switch,
        Field(
            description="Run every trial and return the best, rather than stop at the first that is good enough."
        ),
    ]


@with_config(_CLOSED)
class Calibration(TypedDict, total=False):
    """How much of the calibration data is used.

    ::

        calibration: {sampling_size: 1024}
    """

    sampling_size: Annotated[
        Any,
        _ByKind(value=Count, list=Annotated[list[Count], Field(min_length=1)]),
        Field(description="Calibration samples used at most; of a list, the largest."),
    ]


@with_config(_CLOSED)
class Recipes(TypedDict, total=False):
    """CAT in the words of 2.x.

    ::

        recipes: {cat: true, cat_args: {w_bits: 2}}
    """

    cat: Switch
    cat_args: _Cats


@with_config(_CLOSED)
class Quantization(TypedDict, total=False):
    """What is done to the model.

    ::

        quantization:
          algorithm: cat
          cat: {w_bits: [4, 2], a_bits: 4}
    """

    approach: Literal[
        "auto",
        "static",
        "weight_only",
        "post_training_static_quant",
        "post_training_auto_quant",
        "post_training_weight_only",
    ]
    algorithm: _Algorithm
    cat: _Cats
    rtn: _Host
    gptq: _Host
    awq: _Host
    teq: _Host
    static_quant: _Host
    recipes: Recipes
    calibration: Calibration


@with_config(_CLOSED)
class Model(TypedDict, total=False):
    """The model's name, and the framework it is of, as 2.x wants them.

    ::

        model: {name: digits, framework: pytorch_fx}
    """

    name: _Word
    framework: Literal["pytorch", "pytorch_fx"]


@with_config(_CLOSED)
class RecipeFile(TypedDict, total=False):
    """A quantization recipe in the words of Neural Compressor 2.x or 3.x.

    ::

        algorithm: cat
        cat: {w_bits: 2, a_bits: 4}
    """

    version: Annotated[
        Annotated[float, Field(strict=True)] | _Word,
        Field(description="Version of the recipe format; 1."),
    ]
    model: Model
    device: Literal["cpu", "gpu", "auto"]
    quantization: Quantization
    algorithm: _Algorithm
    cat: _Cats
    rtn: _Host
    gptq: _Host
    awq: _Host
    teq: _Host
    static_quant: _Host
    tuning: Tuning


@functools.cache
def checker(section: Any) -> TypeAdapter[Any]:
    """What checks a recipe (:class:`RecipeFile`), or what stands under ``cat:`` (``Cat``)."""
    return TypeAdapter(section)


@functools.cache
def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes; do not change it."""
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:cat-ptq:recipe:1",
        "title": "CAT recipe",
    }
    return {**head, **_concise(checker(RecipeFile).json_schema())}


def _concise(schema: Any) -> Any:
    """A schema without what goes without saying and what releases of pydantic write differently.

    Titles made of names, all of a docstring but its first paragraph, ``additionalProperties: true``, the form of keys, and
    the points of whole numbers.
    """
    if isinstance(schema, float) and schema.is_integer():
        return int(schema)
    if isinstance(schema, list):
        return [_concise(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _concise(each) for name, each in schema.items() if name not in ("title", "propertyNames")}
    if kept.get("additionalProperties") is True:
        del kept["additionalProperties"]
    if isinstance(text := kept.get("description"), str):
        kept["description"] = text.partition("\n\n")[0]
    return kept


def schema_text() -> str:
    """The schema file's content."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), "utf-8")
