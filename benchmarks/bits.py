"""Names of bit-widths in the rows of transformers: ``w4``, ``w3g64``, ``w4a8``."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Bits", "parse_bits"]


class Bits(NamedTuple):
    """What a name says.

    Attributes
    ----------
    weights
        Bits of a weight.
    group
        Inputs that share a scale; None for one scale a channel.
    activations
        Bits of an activation; None where they stay in float.
    """

    weights: int
    group: int | None
    activations: int | None


def parse_bits(name: str) -> Bits:
    """Read a name of bit-widths.

    Raises
    ------
    ValueError
        If it is not of that form.
    """
    found = re.fullmatch(r"w(\d)(?:g(\d+))?(?:a(\d))?", name.lower())
    if found is None:
        raise ValueError(f"{name!r} is not a name of bits such as w4, w3g64 or w4a8")
    weights, group, activations = found.groups()
    return Bits(int(weights), int(group) if group else None, int(activations) if activations else None)
