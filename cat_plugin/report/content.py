"""Everything that a page shows, as plain data; whoever makes a page gathers it, see :mod:`cat_plugin.cli.report`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cat_plugin.report.blocks import Block

__all__ = [
    "NOT_RECORDED",
    "Content",
    "Evaluation",
    "Section",
    "as_text",
    "bits_of",
    "changes_nothing",
    "short_name",
    "weight_bytes",
]

NOT_RECORDED = "the bundle has no record of it; bundles written by 'cat-ptq quantize' have one"


@dataclass(frozen=True)
class Evaluation:
    """One bundle on labelled data.

    Parameters
    ----------
    name, bits : str
        Of the bundle, and its bit-widths, for people.
    weight_bytes : int
        Of the quantized weights.
    score, plain : float
        Share of the samples given the right class, with and without the correction; `plain` is None without one.
    """

    name: str
    bits: str
    weight_bytes: int
    score: float
    plain: float | None


@dataclass
class Content:
    """What there is to show.

    Parameters
    ----------
    name : str
        Of the bundle.
    manifest : dict
        Of the bundle.
    record : dict
        Its ``report.json``; empty when it has none.
    arrays : dict of str to ndarray, or None
        Of its correction.
    source, samples : str, int
        The labelled data of `evaluations`.
    evaluations : list of Evaluation
        The bundle itself first, then those that it is compared with.
    full_score : float or None
        Of the full-precision model on the same data.
    labels : dict or None
        Of :func:`cat_plugin.report.record.label_changes`, on the same data.
    pictures : dict of int to str
        ``data:`` addresses of samples in `labels`.
    latency : list of dict
        ``runtime``, ``batch``, ``median_ms``, ``p10_ms``, ``p90_ms``, ``threads``, the library first.
    conditions : dict
        On what they were measured: ``processor``, ``cpus``, ``load``.
    library : dict or None
        ``name``, ``bytes`` and ``manifest`` of the compiled library.
    notes : list of str
        What could not be had, and why.
    written : str
        When, and on what machine.
    """

    name: str
    manifest: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray[Any, Any]] | None = None
    source: str = ""
    samples: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    full_score: float | None = None
    labels: dict[str, Any] | None = None
    pictures: dict[int, str] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    library: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    written: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page, or the reason why it is not there.

    Parameters
    ----------
    key, title : str
        Its address within the page, and its heading.
    lead : str
        What it shows, in a sentence or two.
    body : tuple of Block
        Empty when there is nothing to show.
    missing : str
        Then, why.
    """

    key: str
    title: str
    lead: str = ""
    body: tuple[Block, ...] = ()
    missing: str = ""


def as_text(value: object) -> str:
    """A value of a configuration: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def short_name(layer: str) -> str:
    """A layer's name in the user's model; a corrected model holds that one as ``model``."""
    return layer.removeprefix("model.")


def changes_nothing(content: Content) -> bool:
    """Whether the bundle's correction is the identity, chosen because no map gained."""
    step = content.manifest["cluster_affine"]
    return step is not None and step["alpha"] == 0 and step["shapes"].get("beta", [0])[0] == 1


def weight_bytes(layers: list[dict[str, Any]], bits: int | None = None) -> int:
    """Bytes of all weights packed densely, at their own bit-widths or all at one."""
    total = 0
    for layer in layers:
        width = bits or layer["w_bits"] or 32
        total += -(-int(np.prod(layer["weight_shape"])) * width // 8)
    return total


def bits_of(layers: list[dict[str, Any]]) -> str:
    """The bit-widths of most weights: ``W2A4``."""
    counts: Counter[tuple[Any, Any]] = Counter()
    for layer in layers:
        counts[layer["w_bits"], layer["a_bits"]] += int(np.prod(layer["weight_shape"]))
    if not counts:
        return "float"
    (weights, activations), _ = counts.most_common(1)[0]
    return f"W{weights or 'float'}A{activations or 'float'}"
