"""Speed of ONNX Runtime on this CPU: float32, and int8 by its own static quantization (QDQ, per-channel weights).

Run in an environment that holds onnxruntime, onnx and onnxscript, from the checkout::

    OMP_WAIT_POLICY=passive python -m benchmarks.peers.onnxruntime_speed --out onnxruntime.json
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import MODELS, example_of, split_of
from benchmarks.peers.common import Rows, images_of, median_ms, model_folder, relative_error, speed_parser

PRECISIONS = ("fp32", "int8")
IMAGES = 64  # to calibrate on


def export(name: str, root: str | None, folder: Path) -> Path:
    """Write a model as ONNX with a dynamic batch, where it is not there yet, and return the file."""
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    example = (example_of(name),)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.onnx.export(
        MODELS[name](root), example, dynamo=True, dynamic_shapes=shapes, input_names=["x"], output_names=["y"]
    )
    program.save(str(path))
    return path


def quantize(path: Path, name: str, root: str | None) -> Path:
    """Quantize an ONNX model statically to int8, where that is not done yet, and return the file."""
    out = path.with_suffix(".int8.onnx")
    if out.exists():
        return out
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = split_of(name, root, calibration=IMAGES, evaluation=0).calibration.numpy()

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"x": image[None]}

    ready = path.with_suffix(".pre.onnx")
    quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    staged = path.with_suffix(".part.onnx")
    quantize_static(
        str(ready),
        str(staged),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    staged.replace(out)
    return out


def main() -> None:
    """Measure what the command line asks for."""
    import onnxruntime

    options = speed_parser(__doc__, PRECISIONS).parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.out, "onnxruntime")
    with model_folder(options.kept) as folder:
        for name in options.models:
            files: dict[str, Path] = {}
            for batch in options.batches:
                for precision in options.precisions:
                    with rows.row(
                        model=name, batch=batch, precision=precision, threads=options.threads
                    ) as row:
                        if "fp32" not in files:
                            files["fp32"] = export(name, options.data, folder)
                        if precision not in files:
                            files[precision] = quantize(files["fp32"], name, options.data)
                        settings = onnxruntime.SessionOptions()
                        settings.intra_op_num_threads = options.threads
                        settings.inter_op_num_threads = 1
                        settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
                        settings.add_free_dimension_override_by_name("batch", batch)
                        session = onnxruntime.InferenceSession(
                            str(files[precision]), settings, providers=["CPUExecutionProvider"]
                        )
                        x = images_of(name, options.data, batch)
                        with torch.inference_mode():
                            expected = MODELS[name](options.data)(x)
                        feed = {"x": x.numpy()}
                        row["error"] = relative_error(session.run(None, feed)[0], expected)
                        row.update(median_ms(lambda s=session, f=feed: s.run(None, f), options.seconds))


if __name__ == "__main__":
    main()
