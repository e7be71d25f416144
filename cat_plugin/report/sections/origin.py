"""The section on where a bundle comes from."""

from __future__ import annotations

from cat_plugin.graph.preparation import preparation_of
from cat_plugin.report.blocks import Block, Bullets, Details, Facts, Heading, Source
from cat_plugin.report.content import Content, Section, as_text, bits_of
from cat_plugin.report.figures import short

__all__ = ["origin"]


def origin(content: Content) -> Section:
    """Recipe, calibration, versions, hashes."""
    manifest, record = content.manifest, content.record
    engine = record.get("engine", {})
    step = manifest["cluster_affine"]
    how = preparation_of(manifest)
    pairs: list[tuple[str, object]] = [
        ("Model", record.get("model", {}).get("name", "not recorded")),
        ("Bits of most weights", bits_of(manifest["layers"])),
        ("Correction", "none" if step is None else f"{step['op']}, alpha {short(step['alpha'])}"),
        ("Calibration", ", ".join(f"{k} {as_text(v)}" for k, v in manifest["calibration"].items() if v and k != "preparation") or "not recorded"),
        ("Inputs", "not recorded" if how is None else str(how)),
        ("Written by", ", ".join(f"{k} {v}" for k, v in manifest["libraries"].items())),
    ]  # fmt: skip
    if "seconds" in engine:
        pairs.append(
            ("Quantized in", f"{short(engine['seconds'])} s, {engine.get('num_samples', '?')} samples")
        )
    hashes = [(name, entry["sha256"]) for name, entry in manifest["files"].items()]
    body: list[Block] = [Facts(pairs, hashes)]
    notes = [*engine.get("notes", ()), *(f"in float: {name}" for name in engine.get("unquantized", ()))]
    if notes:
        body += [Heading("Notes of the engine"), Bullets(notes)]
    if "recipe" in record:
        text = record["recipe"]
        body.append(Details(text["name"], Source(text["text"])))
    return Section("origin", "Origin", "", tuple(body))
