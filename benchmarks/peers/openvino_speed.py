"""Speed of OpenVINO on this CPU: float32, bfloat16, and int8 quantized by NNCF.

Run in an environment that holds openvino and nncf, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.openvino_speed --out openvino.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.models import ENCODERS, INPUT_SHAPES, MODELS, example_of, split_of
from benchmarks.peers.common import Rows, images_of, median_ms, model_folder, relative_error, speed_parser

PRECISIONS = ("fp32", "bf16", "int8")
IMAGES = 64  # to calibrate on


def convert(name: str, root: str | None) -> Any:
    """Return a model as an OpenVINO model with a dynamic batch."""
    import openvino

    return openvino.convert_model(
        MODELS[name](root), example_input=example_of(name), input=[-1, *INPUT_SHAPES[name]]
    )


def quantize(model: Any, name: str, root: str | None) -> Any:
    """Quantize an OpenVINO model to int8 by NNCF's default, which has a kind of its own for transformers."""
    import nncf

    images = split_of(name, root, calibration=IMAGES, evaluation=0).calibration.numpy()
    dataset = nncf.Dataset([image[None] for image in images])
    kind = nncf.ModelType.TRANSFORMER if name in ENCODERS else None
    preset = nncf.QuantizationPreset.MIXED
    return nncf.quantize(model, dataset, preset=preset, subset_size=IMAGES, model_type=kind)


def models_of(name: str, root: str | None, folder: Path) -> dict[str, Any]:
    """Return a model in float and in int8, from the folder where it holds them."""
    import openvino

    result: dict[str, Any] = {}
    for kind in ("float", "int8"):
        path = folder / f"{name}.{kind}.xml"
        if not path.exists():
            made = convert(name, root) if kind == "float" else quantize(result["float"], name, root)
            staged = folder / f"{name}.{kind}.part.xml"
            openvino.save_model(made, str(staged), compress_to_fp16=False)
            staged.with_suffix(".bin").replace(path.with_suffix(".bin"))
            staged.replace(path)
        result[kind] = openvino.Core().read_model(str(path))
    return result


def main() -> None:
    """Measure what the command line asks for."""
    import openvino

    options = speed_parser(__doc__, PRECISIONS).parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "openvino")
    core = openvino.Core()
    with model_folder(options.kept) as folder:
        for name in options.models:
            models: dict[str, Any] = {}
            for batch in options.batches:
                for precision in options.precisions:
                    about = {"model": name, "batch": batch, "precision": precision}
                    with rows.row(**about, threads=options.threads) as row:
                        models = models or models_of(name, options.data, folder)
                        kind = "int8" if precision == "int8" else "float"
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
