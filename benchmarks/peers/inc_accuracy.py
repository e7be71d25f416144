"""Accuracy of Neural Compressor's own static int8 (pt2e); below 8 bits it has nothing for Conv2d.

The converted graph is evaluated as it stands, with its reference quantize and dequantize operations.

Run in an environment that holds neural-compressor, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.inc_accuracy --out inc.json
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS
from benchmarks.peers.common import Rows, accuracy_parser, accuracy_split, bits_of, score, timed

METHODS = ("static",)


def quantize(model: nn.Module, calibration: Tensor, batch: int) -> nn.Module:
    """Quantize `model` to 8 bits by the host's default static configuration."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

    batches = calibration.split(batch)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    exported = export(model, example_inputs=(batches[0],), dynamic_shapes=shapes)
    prepared = prepare(exported, INT8StaticQuantConfig(), example_inputs=(batches[0],))
    with torch.no_grad():
        for images in batches:
            prepared(images)
    return convert(prepared)


def main() -> None:
    """Measure what the command line asks for; below 8 bits there is nothing to measure, and the rows say so."""
    parser = accuracy_parser(__doc__, METHODS)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "neural-compressor")
    for name in options.models:
        split = accuracy_split(name, options.data, options.samples)
        for bits in options.bits or ("w8a8", "w4a4"):
            w_bits, a_bits = bits_of(bits)
            key = {"model": name, "w_bits": w_bits, "a_bits": a_bits, "method": "static, pt2e"}
            with rows.row(**key, first_last_bits=8, calibration=len(split.calibration)) as row:
                if (w_bits, a_bits) != (8, 8):
                    raise NotImplementedError("no algorithm of this release quantizes Conv2d below 8 bits")
                with timed(row):
                    quantized = quantize(MODELS[name](options.data), split.calibration, options.batch)
                score(row, quantized, split, options)


if __name__ == "__main__":
    main()
