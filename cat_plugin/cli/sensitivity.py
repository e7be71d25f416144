"""``cat-ptq sensitivity``: what quantizing each layer alone does to the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cat_plugin.cli.console import state
from cat_plugin.cli.options import (
    ChannelOrder,
    ImageSize,
    Mean,
    NumClasses,
    Std,
    Weights,
    preparation,
    sources_exist,
)

if TYPE_CHECKING:
    from cat_plugin.ptq import Sensitivity

__all__ = ["sensitivity"]

_BAR = 24
_ROWS = 64


def sensitivity(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="The full-precision model: module:factory, timm:NAME, torchvision:NAME, hf:FOLDER, or a .onnx file.",
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="Calibration samples; labels are not used.")],
    weights: Weights = None,
    num_classes: NumClasses = None,
    w_bits: Annotated[int, typer.Option("--w-bits", min=2, max=8, help="Bits of the weights.")] = 4,
    a_bits: Annotated[int, typer.Option("--a-bits", min=2, max=8, help="Bits of the layers' inputs.")] = 4,
    all_layers: Annotated[
        bool, typer.Option("--all", help="The first and the last layer at these bits too, instead of at 8.")
    ] = False,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    channel_order: ChannelOrder = None,
) -> None:
    """Show which layers and blocks suffer from low bits: each is rounded alone, in the full-precision model.

    The effect is the divergence of the predicted distribution, in nats, with weights, input, or both rounded. Spend bits,
    'overrides' and 'skip' where it is large. A model of several inputs takes an .npz file with an array for each, under the names of its
    arguments.
    """
    sources_exist(data=(data,), weights=weights)
    from cat_plugin.cli.calibration import load_calibration
    from cat_plugin.cli.models import load_model
    from cat_plugin.ptq import QuantSpec
    from cat_plugin.ptq import sensitivity as measure

    prepared = preparation(mean, std, image_size, channel_order)
    ends = None if all_layers else 8
    spec = QuantSpec(w_bits=w_bits, a_bits=a_bits, first_bits=ends, last_bits=ends)
    network = load_model(model, weights, num_classes)
    unsuited = {"--mean": mean, "--std": std, "--image-size": image_size, "--channel-order": channel_order}
    calibration = load_calibration(network, data, _ROWS, prepared, None, unsuited)
    with state.working("measuring") as status:
        found = measure(network, spec, calibration.batches, progress=status.update)
    state.report({"sensitivity": [each.to_dict() for each in found]}, lambda: _table(found), "sensitivity")


def _table(found: list[Sensitivity]) -> Table:
    most = max(each.divergence for each in found) or 1.0
    table = Table(box=None)
    for heading in ("layer", "kind"):
        table.add_column(heading)
    for heading in ("W", "A", "weights", "of weights", "of input", "of both", "changed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for each in found:
        table.add_row(
            escape(each.name),
            each.kind,
            str(each.w_bits),
            str(each.a_bits),
            f"{each.weights:,}",
            *(f"{value:.2g}" for value in (each.weight_divergence, each.input_divergence, each.divergence)),
            f"{100 * each.changed:.1f} %",
            "\N{FULL BLOCK}" * round(_BAR * max(each.divergence, 0.0) / most),
        )
    return table
