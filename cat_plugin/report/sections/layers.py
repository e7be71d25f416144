"""The section on layers."""

from __future__ import annotations

from cat_plugin.report.blocks import Block, Cell, Drawing, Table
from cat_plugin.report.content import NOT_RECORDED, Content, Section, short_name, weight_bytes
from cat_plugin.report.figures import decibel, percent, short, size
from cat_plugin.report.svg.charts import layer_effects

__all__ = ["layers"]


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
    body: list[Block] = []
    if measured or engine:
        body.append(Drawing(layer_effects(drawn)))
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
        said.append(f"Sensitivities are left out: {NOT_RECORDED}.")
    if not engine:
        said.append("Noise is left out: the engine's own report is not in the bundle.")
    headings = ["#", "layer", "kind", "#weight", "#bits W, A", "#size", "#effect, nats", "#changed", "#dB, nearest", "#dB"]  # fmt: skip
    body.append(Table(key + "-table", headings, cells))
    return Section(key, title, " ".join(said), tuple(body))
