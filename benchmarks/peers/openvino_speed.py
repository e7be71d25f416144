"""Speed of OpenVINO on this CPU: float32, bfloat16, and int8 quantized by NNCF.

Run in an environment that holds openvino and nncf, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.openvino_speed --out openvino.json
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import INPUT_SHAPES, MODELS, cifar10, imagenet_sample
from benchmarks.peers.common import Rows, images_of, median_ms, relative_error, speed_parser

PRECISIONS = ("fp32", "bf16", "int8")
IMAGES = 64  # to calibrate on


def convert(name: str, root: str | None) -> Any:
    """Return a model as an OpenVINO model with a dynamic batch."""
    import openvino

    shape = INPUT_SHAPES[name]
    example = torch.randn(2, *shape)
    return openvino.convert_model(MODELS[name](root), example_input=example, input=[-1, *shape])


def quantize(model: Any, name: str, root: str | None) -> Any:
    """Quantize an OpenVINO model to int8 by NNCF's default."""
    import nncf

    images = (cifar10(root) if name == "resnet20" else imagenet_sample(root)).calibration[:IMAGES].numpy()
    dataset = nncf.Dataset([image[None] for image in images])
    return nncf.quantize(model, dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=IMAGES)


def main() -> None:
    """Measure what the command line asks for."""
    import openvino

    options = speed_parser(__doc__, PRECISIONS).parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "openvino")
    core = openvino.Core()
    for name in options.models:
        models: dict[str, Any] = {}
        for batch in options.batches:
            for precision in options.precisions:
                with rows.row(model=name, batch=batch, precision=precision, threads=options.threads) as row:
                    kind = "int8" if precision == "int8" else "float"
                    if "float" not in models:
                        models["float"] = convert(name, options.data)
                    if kind not in models:
                        models[kind] = quantize(models["float"], name, options.data)
                    fixed = models[kind].clone()
                    fixed.reshape([batch, *INPUT_SHAPES[name]])
                    settings = {
                        "INFERENCE_NUM_THREADS": options.threads,
                        "NUM_STREAMS": 1,
                        "PERFORMANCE_HINT": "LATENCY",
                        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
                    }
                    request = core.compile_model(fixed, "CPU", settings).create_infer_request()
                    x = images_of(name, options.data, batch)
                    with torch.inference_mode():
                        expected = MODELS[name](options.data)(x)
                    given = openvino.Tensor(x.numpy())
                    request.set_input_tensor(given)
                    request.infer()
                    row["error"] = relative_error(request.get_output_tensor().data, expected)
                    row.update(median_ms(request.infer, options.seconds))


if __name__ == "__main__":
    main()
