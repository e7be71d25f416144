"""The figures of a report as SVG; colours come from the page's style, so that both themes share one drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cat_plugin.report.figures import decibel, milliseconds, percent, short, size, without_zeros
from cat_plugin.report.svg.axes import Scale, bottom_axis, left_axis, linear, logarithmic
from cat_plugin.report.svg.element import element, join

__all__ = ["Candidate", "accuracy_and_size", "figure", "frontier", "latencies", "layer_effects", "losses"]

WIDTH = 960


@dataclass(frozen=True)
class Candidate:
    """One model in the figure of accuracy and size.

    Parameters
    ----------
    name : str
        Written beside its point.
    weight_bytes : int
        Of its weights.
    score : float
        Share of one, with the correction where there is one.
    plain : float or None
        Share of one without the correction.
    chosen : bool
        Whether the report is about this one.
    """

    name: str
    weight_bytes: int
    score: float
    plain: float | None = None
    chosen: bool = False


def figure(height: float, label: str, *parts: object, fits: bool = False) -> Markup:
    """A drawing with a name for screen readers; one that fits is shown whole on a narrow screen, others are scrolled."""
    drawing = element(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        class_="chart fits" if fits else "chart",
        role="img",
        aria_label=label,
    )
    return element("div", drawing, class_="figure")


def _tip(text: str) -> Markup:
    return element("title", text)


def frontier(candidates: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those that no other one beats in both size and score, by size."""
    best: list[tuple[int, float]] = []
    for weight_bytes, score in sorted(candidates, key=lambda each: (each[0], -each[1])):
        if not best or score > best[-1][1]:
            best.append((weight_bytes, score))
    return best


def _free(boxes: list[tuple[float, float, float]], x: float, y: float, width: float) -> float:
    """A height near `y` at which a label does not cover another one."""
    for shift in (0, 15, -15, 30, -30, 45, -45, 60, -60):
        at = y + shift
        if all(abs(at - other) >= 14 or x > right or x + width < left for left, right, other in boxes):
            boxes.append((x, x + width, at))
            return at
    return y


def accuracy_and_size(
    candidates: Sequence[Candidate], full: tuple[int, float] | None, unit: str = "top-1"
) -> Markup:
    """Accuracy over the size of the weights, with the line of those that nothing beats in both."""
    left, right, top, bottom = 88, WIDTH - 24, 40, 330
    sizes = [each.weight_bytes for each in candidates] + ([full[0]] if full else [])
    scores = [each.score for each in candidates] + [c.plain for c in candidates if c.plain is not None]
    x = logarithmic(sizes, left + 24, right - 120, binary=True)
    y = linear([*scores, *([full[1]] if full else [])], bottom, top, 0.12)
    y = Scale(max(y.low, 0.0), min(y.high, 1.005), bottom, top)
    digits = sum(y.high - y.low < span for span in (0.05, 0.005))
    parts: list[object] = [
        bottom_axis(x, top, bottom, "size of the weights", lambda v: without_zeros(size(v)), grid=False),
        left_axis(y, left, right, f"{unit} accuracy", lambda v: percent(v, digits)),
    ]
    points = [(each.weight_bytes, each.score) for each in candidates] + ([full] if full else [])
    best = frontier(points)
    path = f"M{x(best[0][0]):.1f} {y(best[0][1]):.1f}"
    for weight_bytes, score in best[1:]:
        path += f"H{x(weight_bytes):.1f}V{y(score):.1f}"
    parts.append(element("path", class_="frontier", d=path))
    boxes: list[tuple[float, float, float]] = []
    if full is not None:
        at = x(full[0]), y(full[1])
        text = f"full precision: {percent(full[1])}, {size(full[0])}"
        parts.append(element("circle", _tip(text), class_="mark before", cx=at[0], cy=at[1], r=5))
        parts.append(element("text", "full precision", class_="note", x=at[0] + 11, y=at[1] + 4))
        boxes.append((at[0], at[0] + 100, at[1] + 4))
    for each in sorted(candidates, key=lambda one: not one.chosen):
        cx, cy = x(each.weight_bytes), y(each.score)
        text = f"{each.name}: {percent(each.score)}, {size(each.weight_bytes)}"
        if each.plain is not None:
            text += f"; without the correction {percent(each.plain)}"
            parts.append(element("line", class_="stem", x1=cx, x2=cx, y1=y(each.plain), y2=cy))
            parts.append(element("circle", _tip(text), class_="mark before", cx=cx, cy=y(each.plain), r=4))
        kind = "mark after chosen" if each.chosen else "mark after"
        parts.append(element("circle", _tip(text), class_=kind, cx=cx, cy=cy, r=7 if each.chosen else 5))
        at_y = _free(boxes, cx + 11, cy + 4, 7 * len(each.name))
        parts.append(
            element("text", each.name, class_="note strong" if each.chosen else "note", x=cx + 11, y=at_y)
        )
    return figure(bottom + 48, "Accuracy over size of the weights", *parts, fits=True)


def _room(names: Iterable[str], beside: float = 0.0, letter: float = 9.5) -> float:
    """Where a figure begins that has names to its left, as wide as on a narrow screen, and what else stands there."""
    return beside + 28 + letter * max((len(_shortened(name)) for name in names), default=0)


def losses(rows: Sequence[tuple[str, float, float]], what: str) -> Markup:
    """Two dots a row, before and after, on a scale of equal ratios."""
    step, left, top = 25, _room((name for name, *_ in rows), letter=12.5), 14
    bottom = top + step * len(rows)
    x = logarithmic([value for _, *both in rows for value in both], left, WIDTH - 24)
    parts: list[object] = [bottom_axis(x, top, bottom, what)]
    for number, (name, before, after) in enumerate(rows):
        y = top + step * (number + 0.5)
        change = f", {short(before / after)} times less" if 0 < after < before else ""
        text = f"{name}: {short(before)} before, {short(after)} after{change}"
        ends = (x(before), x(after)) if before > 0 and after > 0 else None
        parts.append(
            element(
                "text", _shortened(name), _tip(name), class_="row", x=left - 14, y=y + 4, text_anchor="end"
            )
        )
        if ends is None:
            continue
        parts.append(
            element(
                "g",
                _tip(text),
                element("line", class_="link", x1=ends[0], x2=ends[1], y1=y, y2=y),
                element("circle", class_="mark before", cx=ends[0], cy=y, r=4.5),
                element("circle", class_="mark after", cx=ends[1], cy=y, r=4.5),
            )
        )
    return figure(bottom + 48, what, *parts, fits=True)


def _shortened(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[-most + 1 :]}"


def layer_effects(rows: Sequence[dict[str, Any]]) -> Markup:
    """Two panels that share their rows: what a layer does to the prediction, and how clean its output is.

    Parameters
    ----------
    rows : sequence of dict
        ``name``, ``bits`` and, where known, ``divergence`` and ``loss`` (relative squared error of the output).
    """
    step, left, top = 20, _room(row["name"] for row in rows), 30
    bottom = top + step * len(rows)
    gap, bits_at = 44, left + 4
    has = [any(row.get(key) is not None for row in rows) for key in ("divergence", "loss")]
    first, last = left + 66, WIDTH - 24
    middle = (first + last) / 2
    spans = [(first, middle - gap / 2), (middle + gap / 2, last)] if all(has) else [(first, last)] * 2
    effects = [row["divergence"] for row in rows if row.get("divergence") is not None]
    ratios = [value for row in rows if (value := decibel(row.get("loss"))) is not None]
    parts: list[object] = [
        element("text", "bits", class_="axis", x=bits_at, y=top - 12),
    ]
    effect = Scale(0.0, max([*effects, 1e-9]) * 1.04, *spans[0])
    ratio = Scale(min([*ratios, 0.0]), max([*ratios, 1.0]) * 1.04, *spans[1])
    if has[0]:
        parts.append(
            bottom_axis(effect, top, bottom, "effect on the prediction (KL divergence, nats)", count=4)
        )
    if has[1]:
        parts.append(
            bottom_axis(ratio, top, bottom, "signal to quantization noise (dB)", lambda v: short(v, 2), 4)
        )
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        name, shown = row["name"], _shortened(row["name"])
        parts.append(
            element("text", shown, _tip(name), class_="row", x=left - 14, y=y + 4, text_anchor="end")
        )
        parts.append(element("text", row["bits"], class_="row", x=bits_at, y=y + 4))
        divergence, noise = row.get("divergence"), decibel(row.get("loss"))
        if divergence is not None:
            width = effect(divergence) - spans[0][0]
            text = f"{name}: {short(divergence)} nats; {percent(row.get('changed'), 1)} of the classes change"
            parts.append(
                element(
                    "rect",
                    _tip(text),
                    class_="bar",
                    x=spans[0][0],
                    y=y - 5,
                    width=max(width, 1),
                    height=10,
                    rx=2,
                )
            )
        if noise is not None:
            text = f"{name}: {short(noise)} dB"
            zero = ratio(max(ratio.low, 0.0) if ratio.low <= 0 else ratio.low)
            at = ratio(noise)
            parts.append(element("line", class_="link", x1=zero, x2=at, y1=y, y2=y))
            parts.append(element("circle", _tip(text), class_="mark after", cx=at, cy=y, r=4.5))
    return figure(bottom + 48, "Layers", *parts)


def latencies(rows: Sequence[dict[str, Any]]) -> Markup:
    """A dot at the median with a line from p10 to p90, grouped by batch size, on a scale of equal ratios."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    first = rows[0]["runtime"]
    left, step = _room((row["runtime"] for row in rows), beside=62), 24
    x = logarithmic([row[key] for row in rows for key in ("p10_ms", "p90_ms")], left, WIDTH - 110)
    parts: list[object] = []
    y = 0.0
    for batch in batches:
        parts.append(element("text", f"batch {batch}", class_="axis", x=0, y=y + step / 2 + 4))
        for row in (row for row in rows if row["batch"] == batch):
            y += step
            middle = y - step / 2
            times = [milliseconds(row[key]) for key in ("median_ms", "p10_ms", "p90_ms")]
            text = f"{row['runtime']}, batch {batch}: median {times[0]}, p10 {times[1]}, p90 {times[2]}"
            span = x(row["p10_ms"]), x(row["p90_ms"])
            kind = "mark after" if row["runtime"] == first else "mark quiet"
            parts += [
                element("text", row["runtime"], class_="row", x=left - 14, y=middle + 4, text_anchor="end"),
                element(
                    "g",
                    _tip(text),
                    element("line", class_="link", x1=span[0], x2=span[1], y1=middle, y2=middle),
                    element("circle", class_=kind, cx=x(row["median_ms"]), cy=middle, r=5),
                ),
                element("text", times[0], class_="row", x=span[1] + 12, y=middle + 4),
            ]
        y += 14
    bottom = y - 8
    return figure(
        bottom + 48,
        "Latency",
        bottom_axis(x, 0, bottom, "time of a call", lambda v: without_zeros(milliseconds(v))),
        join(parts),
    )
