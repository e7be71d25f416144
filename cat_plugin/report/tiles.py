"""The key figures at the top of a page."""

from __future__ import annotations

from dataclasses import dataclass

from cat_plugin.report.content import Content, bits_of, weight_bytes
from cat_plugin.report.figures import milliseconds, percent, size

__all__ = ["Tile", "key_figures"]


@dataclass(frozen=True)
class Tile:
    """A figure, what it is of, and a line of detail."""

    value: str
    name: str
    detail: str = ""


def key_figures(content: Content) -> list[Tile]:
    """Accuracy, bits, size, and latency or clusters; what is not known is left out."""
    layers = content.manifest["layers"]
    packed, full = weight_bytes(layers), weight_bytes(layers, 32)
    tiles: list[Tile] = []
    tuning = content.record.get("tuning") or {}
    best = next((trial for trial in tuning.get("trials", ()) if trial["best"]), None)
    if content.evaluations:
        own, other = content.evaluations[0], content.full_score
        known = [f"{percent(own.plain)} without CAT"] if own.plain is not None else []
        known += [f"{percent(other)} in full precision"] if other is not None else []
        tiles.append(Tile(percent(own.score), "top-1 accuracy", ", ".join(known)))
    elif best is not None:
        known = [f"{percent(best['uncorrected'])} without CAT"] if best.get("uncorrected") is not None else []
        detail = ", ".join([*known, f"{percent(tuning.get('baseline'))} in full precision, on tuning data"])
        tiles.append(Tile(percent(best["score"]), "top-1 accuracy", detail))
    widths = {layer["w_bits"] for layer in layers}
    others = f"{len(layers)} layers" + (", some wider" if len(widths) > 1 else "")
    tiles.append(Tile(bits_of(layers), "bits", others))
    if packed:
        tiles.append(Tile(size(packed), "weights", f"{full / packed:.1f} times smaller than float32"))
    if content.latency:
        first = content.latency[0]
        rest = [row for row in content.latency if row["batch"] == first["batch"] and row is not first]
        detail = f"batch {first['batch']}" + (
            f", PyTorch {milliseconds(rest[-1]['median_ms'])}" if rest else ""
        )
        tiles.append(Tile(milliseconds(first["median_ms"]), "latency", detail))
    elif content.manifest["cluster_affine"] is not None:
        shape = content.manifest["cluster_affine"]["shapes"].get("beta", [0])
        tiles.append(
            Tile(str(shape[0]), "clusters", f"alpha {content.manifest['cluster_affine']['alpha']:g}")
        )
    return tiles
