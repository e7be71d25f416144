"""The section on a compiled library."""

from __future__ import annotations

from cat_plugin.report.blocks import Block, Cell, Details, Drawing, Facts, Table
from cat_plugin.report.content import Content, Section
from cat_plugin.report.figures import DASH, milliseconds, short, size
from cat_plugin.report.svg.charts import latencies

__all__ = ["library"]


def library(content: Content) -> Section:
    """Latency and size of the compiled library."""
    key, title = "speed", "Compiled library"
    made = content.library
    if made is None:
        return Section(key, title, missing="no compiled library was given; add --library LIB.so")
    manifest = made["manifest"]
    body: list[Block] = []
    if content.latency:
        body.append(Drawing(latencies(content.latency)))
    kernels = manifest.get("kernels") or []
    variants = manifest["variants"]
    body.append(
        Facts(
            [
                ("Library", f"{made['name']}, {size(made['bytes'])}"),
                (
                    "Targets",
                    ", ".join(f"{v.get('variant') or 'native'} ({v.get('target')})" for v in variants),
                ),
                ("Left in float", ", ".join(sorted(set(manifest.get("float_ops", ())))) or "nothing"),
                ("Packed weights", size(sum(k.get("weight_bytes", 0) for k in kernels))),
            ]
        )
    )
    if content.latency:
        cells = [
            [
                row["runtime"],
                Cell(row["batch"], row["batch"]),
                *(Cell(milliseconds(row[k]), row[k]) for k in ("median_ms", "p10_ms", "p90_ms")),
                Cell(milliseconds(row["median_ms"] / row["batch"]), row["median_ms"] / row["batch"]),
            ]
            for row in content.latency
        ]
        headings = ["runtime", "#batch", "#median", "#p10", "#p90", "#a sample"]
        body.append(Table(key + "-table", headings, cells))
    if kernels:
        cells = [
            [
                Cell(number, number),
                k["name"],
                k.get("variant", ""),
                " \N{MULTIPLICATION SIGN} ".join(map(str, k.get("output", ()))),
                Cell(k.get("weight_bits") or DASH, k.get("weight_bits") or None),
                Cell(size(k.get("weight_bytes")), k.get("weight_bytes")),
                Cell(short(k.get("operations")), k.get("operations")),
            ]
            for number, k in enumerate(kernels, 1)
        ]
        headings = ["#", "kernel", "variant", "output", "#bits", "#weights", "#operations a sample"]
        shown = Table("kernels-table", headings, cells)
        body.append(Details(f"{len(kernels)} kernels", shown))
    return Section(key, title, _how(content), tuple(body))


def _how(content: Content) -> str:
    """How the latencies were measured, and what else kept the machine busy."""
    if not content.latency:
        return ""
    said = "Every runtime was timed in a process of its own. Dots are medians, lines reach from p10 to p90."
    threads, here = content.latency[0].get("threads"), content.conditions
    if threads and here:
        count = "one thread" if threads == 1 else f"{threads} threads"
        of = f"{here['cpus']} processor{'s' if here['cpus'] > 1 else ''}"
        said += f" All had {count}, on {of} ({here['processor']}); before, the load of the machine was {here['load']:g}."
        if here["load"] > 0.5:
            said += " It was not idle, so that the times are longer than they need be."
    return said
