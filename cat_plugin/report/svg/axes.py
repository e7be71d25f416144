"""Scales with readable ticks, and the axes drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup

from cat_plugin.report.figures import round_number
from cat_plugin.report.svg.element import element, join

__all__ = ["Scale", "bottom_axis", "left_axis", "linear", "logarithmic"]


@dataclass(frozen=True)
class Scale:
    """From values to positions.

    Parameters
    ----------
    low, high : float
        Ends of the values, ``low < high``.
    start, end : float
        Their positions.
    log : bool
        Whether equal ratios have equal lengths; then ``low > 0``.
    binary : bool
        Whether powers of two are round, as for bytes.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    binary: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value; values beyond the ends stay at them."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values between the ends."""
        if self.binary:
            return _powers_of_two(self.low, self.high, count)
        return _log_ticks(self.low, self.high, count) if self.log else _even_ticks(self.low, self.high, count)


def _step(span: float, count: int) -> float:
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def _even_ticks(low: float, high: float, count: int) -> list[float]:
    step = _step(high - low, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


def _powers_of_two(low: float, high: float, count: int) -> list[float]:
    found = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    every = max(1, math.ceil(len(found) / count))
    return found[::every] if len(found) > 1 else [low * (high / low) ** share for share in (0.1, 0.9)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high * 1.0001]
        if len(found) >= min(count, 3):
            break
    else:
        return _even_ticks(low, high, count)
    every = max(1, math.ceil(len(found) / (2 * count)))
    return found[::every]


def linear(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """An even scale around values, with a margin on both sides; equal values get room to either side."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    room = (high - low) * margin if high > low else max(abs(high) * 0.05, 0.5)
    return Scale(low - room, high + room, start, end)


def logarithmic(values: Iterable[float], start: float, end: float, binary: bool = False) -> Scale:
    """A scale of equal ratios around positive values; `binary` as in :class:`Scale`."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found), max(found)
    room = (high / low) ** 0.06 if high > low * 1.2 else 1.5
    return Scale(low / room, high * room, start, end, log=True, binary=binary)


def bottom_axis(
    scale: Scale,
    top: float,
    bottom: float,
    title: str,
    label: Callable[[float], str] = round_number,
    count: int = 6,
    grid: bool = True,
) -> Markup:
    """Ticks below a figure, each with a line through it."""
    parts = []
    for tick in scale.ticks(count):
        x = scale(tick)
        if grid:
            parts.append(element("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        parts.append(element("text", label(tick), class_="tick", x=x, y=bottom + 16, text_anchor="middle"))
    middle = (scale.start + scale.end) / 2
    parts.append(element("text", title, class_="axis", x=middle, y=bottom + 43, text_anchor="middle"))
    return join(parts)


def left_axis(
    scale: Scale,
    left: float,
    right: float,
    title: str,
    label: Callable[[float], str] = round_number,
    count: int = 5,
) -> Markup:
    """Ticks left of a figure, each with a line through it, and the title above them."""
    parts = []
    for tick in scale.ticks(count):
        y = scale(tick)
        parts.append(element("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        parts.append(element("text", label(tick), class_="tick", x=left - 8, y=y + 4, text_anchor="end"))
    parts.append(element("text", title, class_="axis", x=0, y=min(scale.start, scale.end) - 14))
    return join(parts)
