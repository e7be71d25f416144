"""The form of ``report.json``: what its parts hold, as types that a record is checked against when it is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

__all__ = [
    "Clusters",
    "Engine",
    "Labels",
    "Layer",
    "LayerEffect",
    "LayerOutliers",
    "Mean",
    "Model",
    "Outliers",
    "Recipe",
    "Record",
    "Sensitivity",
    "Trial",
    "Tuning",
    "Unit",
]

Number = float | None
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class Model(TypedDict, total=False):
    """The full-precision model."""

    name: str
    parameters: int


class Recipe(TypedDict):
    """The recipe's file."""

    name: str
    text: str


class Layer(TypedDict):
    """A layer of the engine's report."""

    name: str
    loss_before: NotRequired[Number]
    loss_after: NotRequired[Number]


class Unit(TypedDict):
    """What was trained together."""

    name: str
    kind: NotRequired[str]
    loss_before: NotRequired[Number]
    loss_after: NotRequired[Number]
    steps: NotRequired[int]
    note: NotRequired[str]


class Engine(TypedDict, total=False):
    """The engine's report."""

    layers: list[Layer]
    units: list[Unit]
    unquantized: list[str]
    notes: list[str]
    num_samples: int
    seconds: float


class Trial(TypedDict):
    """One configuration and how it fared."""

    name: str
    config: dict[str, Any]
    score: float
    seconds: float
    met: bool
    best: bool
    uncorrected: NotRequired[Number]
    weight_bytes: NotRequired[int | None]


class Tuning(TypedDict):
    """The trials."""

    trials: list[Trial]
    source: NotRequired[str]
    samples: NotRequired[int]
    baseline: NotRequired[Number]
    target: NotRequired[Number]


class Labels(TypedDict):
    """Samples that the models are not unanimous about."""

    samples: Annotated[int, Field(ge=1)]
    correct: dict[str, int]
    models: Annotated[list[Literal["full", "quantized", "corrected"]], Field(min_length=1)]
    rows: list[Annotated[list[int], Field(min_length=3, max_length=5)]]
    source: NotRequired[str]
    differing: NotRequired[int]
    changes: NotRequired[dict[str, Annotated[list[int], Field(min_length=3, max_length=3)]]]
    names: NotRequired[dict[str, str]]


class LayerEffect(TypedDict):
    """What quantizing one layer alone does."""

    name: str
    divergence: float
    changed: float


class Sensitivity(TypedDict):
    """Layer by layer."""

    rows: int
    layers: list[LayerEffect]


class Mean(TypedDict):
    """The means of one cluster, in two principal components."""

    cluster: int
    rows: int
    quantized: Pair
    corrected: Pair
    full: NotRequired[Pair]


class Clusters(TypedDict):
    """Logits in two principal components."""

    rows: int
    explained: Pair
    points: list[Annotated[list[float], Field(min_length=3, max_length=3)]]
    means: list[Mean]
    error: NotRequired[Pair]
    agreement: NotRequired[Pair]


class LayerOutliers(TypedDict):
    """How far the largest channel of a layer's input stands out, in full precision and as it is quantized."""

    name: str
    before: float
    after: float


class Outliers(TypedDict):
    """Layer by layer."""

    rows: int
    layers: list[LayerOutliers]


class Record(TypedDict, total=False):
    """The whole file; a part that is not there is left out of the page."""

    version: Literal[1]
    model: Model
    recipe: Recipe
    config: dict[str, Any]
    engine: Engine
    tuning: Tuning
    labels: Labels
    sensitivity: Sensitivity
    clusters: Clusters
    outliers: Outliers
