"""The sections of a report: each takes the content and says either something or why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cat_plugin.report.accuracy import accuracy
from cat_plugin.report.content import Content, Section, bits_of, short_name, weight_bytes
from cat_plugin.report.figures import DASH, decibel, milliseconds, percent, short, size
from cat_plugin.report.labels import label_section
from cat_plugin.report.markup import element
from cat_plugin.report.svg.charts import latencies, layer_effects, losses
from cat_plugin.report.svg.maps import cluster_map, enlargement, slopes_and_offsets, spread
from cat_plugin.report.tables import Cell, facts, legend, table

__all__ = ["SECTIONS"]

_RECORD = "the bundle has no record of it; bundles written by 'cat-ptq quantize' have one"


def layers(content: Content) -> Section:
    """Bits, size, sensitivity and noise of each layer."""
    key, title = "layers", "Layers"
    listed = content.manifest["layers"]
    if not listed:
        return Section(key, title, missing="the graph has no convolution or linear layer")
    engine = {x["name"]: x for x in content.record.get("engine", {}).get("layers", ())}
    sensitivity = content.record.get("sensitivity")
    measured = {x["name"]: x for x in sensitivity["layers"]} if sensitivity else {}
    drawn, cells = [], []
    for number, layer in enumerate(listed):
        name = short_name(layer["name"])
        own, effect = engine.get(name, {}), measured.get(name, {})
        w_bits, a_bits = (str(layer[k] or "float") for k in ("w_bits", "a_bits"))
        drawn.append(
            {
                "name": name,
                "bits": f"W{w_bits} A{a_bits}",
                "divergence": effect.get("divergence"),
                "changed": effect.get("changed"),
                "loss": own.get("loss_after"),
            }
        )
        noise = [decibel(own.get(k)) for k in ("loss_before", "loss_after")]
        packed = weight_bytes([layer])
        cells.append(
            [
                Cell(number + 1, number + 1),
                name,
                layer["kind"],
                Cell("\N{MULTIPLICATION SIGN}".join(map(str, layer["weight_shape"])), packed),
                Cell(f"{w_bits}, {a_bits}", (layer["w_bits"] or 32) + (layer["a_bits"] or 32) / 100),
                Cell(size(packed), packed),
                Cell(short(effect.get("divergence")), effect.get("divergence")),
                Cell(percent(effect.get("changed"), 1), effect.get("changed")),
                Cell(short(noise[0]), noise[0]),
                Cell(short(noise[1]), noise[1]),
            ]
        )
    body: list[object] = []
    if measured or engine:
        body.append(layer_effects(drawn))
    said = []
    if measured:
        said.append(
            f"The effect on the prediction is what rounding this layer alone does to the full-precision model, on "
            f"{sensitivity['rows'] if sensitivity else ''} calibration samples."
        )
    if engine:
        said.append(
            "Signal to quantization noise is that of the layer's output in the finished model, with everything before it "
            "quantized too."
        )
    if not measured:
        said.append(f"Sensitivities are left out: {_RECORD}.")
    if not engine:
        said.append("Noise is left out: the engine's own report is not in the bundle.")
    headings = ["#", "layer", "kind", "#weight", "#bits W, A", "#size", "#effect, nats", "#changed", "#dB, nearest", "#dB"]  # fmt: skip
    body.append(table(key + "-table", headings, cells))
    return Section(key, title, " ".join(said), tuple(body))


def reconstruction(content: Content) -> Section:
    """Losses before and after, of trained units or of the layers."""
    key, title = "losses", "Reconstruction"
    engine = content.record.get("engine")
    if not engine:
        return Section(key, title, missing="the engine's own report is not in the bundle")
    units = _pairs([u for u in engine.get("units", ()) if u.get("kind", "unit") == "unit"])
    whole = [u for u in engine.get("units", ()) if u.get("kind", "unit") != "unit"]
    singles = _pairs(engine.get("layers", ()))
    body: list[object] = []
    marks = legend(("before", "before"), ("after", "after"))
    if units:
        body += [
            element("h3", "Trained units"),
            losses(units, "relative squared error of the unit's output"),
            marks,
        ]
    if singles:
        body += [
            element("h3", "Layers: rounded to nearest, and as delivered"),
            losses(singles, "relative squared error of the layer's output"),
            marks if not units else None,
        ]
    cells = [
        [
            u["name"],
            u.get("kind", ""),
            Cell(u.get("steps", DASH), u.get("steps")),
            Cell(short(u.get("loss_before")), u.get("loss_before")),
            Cell(short(u.get("loss_after")), u.get("loss_after")),
            u.get("note", ""),
        ]
        for u in engine.get("units", ())
    ]
    if cells:
        body.append(table(key + "-table", ["unit", "kind", "#steps", "#before", "#after", "note"], cells))
    if not body:
        return Section(key, title, missing="nothing was trained and no loss was recorded")
    lead = "How far each output is from the full-precision one, relative to its mean square."
    if whole:
        lead += " Stages on the logits (model, refinement) are in the table; their loss is a divergence."
    return Section(key, title, lead, tuple(body))


def _pairs(entries: Any) -> list[tuple[str, float, float]]:
    return [
        (e["name"], e["loss_before"], e["loss_after"])
        for e in entries
        if e.get("loss_before") is not None and e.get("loss_after") is not None
    ]


def clusters(content: Content) -> Section:
    """The logits in two dimensions."""
    key, title = "clusters", "Clusters"
    summary = content.record.get("clusters")
    if content.manifest["cluster_affine"] is None:
        return Section(key, title, missing="the bundle has no correction")
    if summary is None:
        return Section(key, title, missing=_RECORD)
    lead = (
        f"The quantized logits of {summary['rows']} calibration samples. An arrow leads from the mean of a cluster to the mean "
        "of its corrected logits; the ring is where the full-precision model has it."
    )
    factor = enlargement(summary)
    if factor > 1:
        lead += f" Both are drawn {factor} times further from the mean than they are."
    body: list[object] = [
        cluster_map(summary),
        legend(("dot", "a sample"), ("before", "mean, quantized"), ("arrow", "moved by the correction"), ("goal", "full precision")),
    ]  # fmt: skip
    if "error" in summary and "agreement" in summary:
        before, after = zip(summary["error"], summary["agreement"], strict=True)
        body.append(
            facts(
                [
                    ("Squared error to the full-precision logits", f"{short(before[0])} before, {short(after[0])} after"),
                    ("Samples given the full-precision class", f"{percent(before[1])} before, {percent(after[1])} after"),
                ]
            )
        )  # fmt: skip
    return Section(key, title, lead, tuple(body))


def correction(content: Content) -> Section:
    """The ranges of slopes and offsets."""
    key, title = "correction", "Slopes and offsets"
    step = content.manifest["cluster_affine"]
    if step is None or content.arrays is None:
        return Section(key, title, missing="the bundle has no correction")
    found = slopes_and_offsets(content.arrays)
    if found is None:
        return Section(key, title, missing="the correction's arrays are not of the form that is drawn")
    gamma, beta = found
    full = step["op"].endswith("_full")
    lead = (
        f"In each of {len(beta)} clusters the logit of class c becomes gamma times itself plus beta, blended with alpha "
        f"{short(step['alpha'])}. Lines reach from the least to the greatest class, bars hold the middle half; the dashed "
        "line changes nothing."
    )
    if full:
        lead += " This map is a full matrix; gamma is its diagonal."
    cells = [
        [Cell(k, k), *(Cell(short(value, 4), value) for row in (gamma[k], beta[k]) for value in (float(row.min()), float(row.mean()), float(row.max())))]
        for k in range(len(beta))
    ]  # fmt: skip
    headings = ["#cluster", "#gamma least", "#mean", "#greatest", "#beta least", "#mean", "#greatest"]
    numbers = table(key + "-table", headings, cells)
    if len(cells) > 16:
        numbers = element("details", element("summary", f"{len(cells)} clusters in numbers"), numbers)
    return Section(key, title, lead, (spread(gamma, "gamma", 1.0), spread(beta, "beta", 0.0), numbers))


def tuning(content: Content) -> Section:
    """The tuner's trials."""
    key, title = "trials", "Trials"
    run = content.record.get("tuning")
    if not run:
        return Section(
            key, title, missing="the recipe was run without tuning data (--tune), so there were no trials"
        )
    names = sorted({name for trial in run["trials"] for name in trial["config"]})
    differing = [n for n in names if len({json.dumps(t["config"].get(n)) for t in run["trials"]}) > 1]
    cells = [
        [
            Cell(number, number),
            Cell(trial["name"], trial["name"], trial["best"]),
            *(Cell(value := _plain(trial["config"].get(name)), value) for name in differing),
            Cell(percent(trial.get("uncorrected")), trial.get("uncorrected")),
            Cell(percent(trial["score"]), trial["score"], trial["best"]),
            "met" if trial["met"] else "missed",
            Cell(size(trial.get("weight_bytes")), trial.get("weight_bytes")),
            Cell(f"{trial['seconds']:.1f}", trial["seconds"]),
        ]
        for number, trial in enumerate(run["trials"], 1)
    ]
    lead = (
        f"Scored on {run.get('samples', '')} samples of {run.get('source', '')}. Full precision has "
        f"{percent(run.get('baseline'))}, a trial meets the criterion from {percent(run.get('target'))} on. "
        "The one in bold is in this bundle."
    )
    headings = ["#trial", "configuration", *differing, "#without CAT", "#score", "criterion", "#weights", "#seconds"]  # fmt: skip
    return Section(key, title, lead, (table(key + "-table", headings, cells),))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def speed(content: Content) -> Section:
    """Latency and size of the compiled library."""
    key, title = "speed", "Compiled library"
    library = content.library
    if library is None:
        return Section(key, title, missing="no compiled library was given; add --library LIB.so")
    manifest = library["manifest"]
    body: list[object] = []
    if content.latency:
        body.append(latencies(content.latency))
    kernels = manifest.get("kernels") or []
    variants = manifest["variants"]
    body.append(
        facts(
            [
                ("Library", f"{library['name']}, {size(library['bytes'])}"),
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
        body.append(table(key + "-table", headings, cells))
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
        shown = table("kernels-table", headings, cells)
        body.append(element("details", element("summary", f"{len(kernels)} kernels"), shown))
    lead = (
        "Every runtime was timed in a process of its own. Dots are medians, lines reach from p10 to p90."
        if content.latency
        else ""
    )
    return Section(key, title, lead, tuple(body))


def origin(content: Content) -> Section:
    """Recipe, calibration, versions, hashes."""
    manifest, record = content.manifest, content.record
    engine = record.get("engine", {})
    step = manifest["cluster_affine"]
    pairs: list[tuple[str, object]] = [
        ("Model", record.get("model", {}).get("name", "not recorded")),
        ("Bits of most weights", bits_of(manifest["layers"])),
        ("Correction", "none" if step is None else f"{step['op']}, alpha {short(step['alpha'])}"),
        ("Calibration", ", ".join(f"{k} {_plain(v)}" for k, v in manifest["calibration"].items() if v != {}) or "not recorded"),
        ("Written by", ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items())),
    ]  # fmt: skip
    if "seconds" in engine:
        pairs.append(
            ("Quantized in", f"{short(engine['seconds'])} s, {engine.get('num_samples', '?')} samples")
        )
    pairs += [(name, element("code", entry["sha256"])) for name, entry in manifest["files"].items()]
    body: list[object] = [facts(pairs)]
    notes = [*engine.get("notes", ()), *(f"in float: {name}" for name in engine.get("unquantized", ()))]
    if notes:
        body += [
            element("h3", "Notes of the engine"),
            element("ul", *(element("li", note) for note in notes)),
        ]
    if "recipe" in record:
        text = record["recipe"]
        body.append(element("details", element("summary", text["name"]), element("pre", text["text"])))
    return Section("origin", "Origin", "", tuple(body))


SECTIONS: tuple[Callable[[Content], Section], ...] = (
    accuracy,
    label_section,
    layers,
    reconstruction,
    clusters,
    correction,
    tuning,
    speed,
    origin,
)
"""The parts of a page in their order."""
