"""ONNX models run over data by ONNX Runtime: what goes in, which tensor is the logits, and their values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cat_plugin.errors import CalibrationError, CATValueError, no_calibration_batch
from cat_plugin.graph.onnx.files import need

__all__ = ["OnnxClassifier", "batches_of", "collect", "described_inputs", "session_of", "showing"]


def session_of(model: Any, *, optimized: bool = True) -> Any:
    """A session on the CPU, of a model in memory or of a file, with OMP_NUM_THREADS threads where that is set.

    Parameters
    ----------
    model : onnx.ModelProto or str
        The model, or the path of its file.
    optimized : bool, default True
        False runs the nodes as they stand.

    Raises
    ------
    CATValueError
        When ONNX Runtime cannot load it.
    """
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model if isinstance(model, str) else model.SerializeToString()
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise CATValueError(f"ONNX Runtime {runtime.__version__} cannot load the model: {error}") from error


def described_inputs(model: Any) -> list[dict[str, str]]:
    """Name and dtype of each input of an ONNX model, in order; what has a stored value is none.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    """
    onnx = need("onnx")
    stored = {each.name for each in model.graph.initializer}
    return [
        {
            "name": each.name,
            "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type)),
        }
        for each in model.graph.input
        if each.name not in stored
    ]


def showing(model: Any, names: Sequence[str]) -> Any:
    """A copy of a model with further values as outputs.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    names : sequence of str
        Values that nodes of the graph make.

    Returns
    -------
    onnx.ModelProto
    """
    onnx = need("onnx")
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    held = {each.name for each in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in held)
    return shown


def batches_of(data: Any) -> Iterator[Mapping[str, np.ndarray[Any, Any]] | np.ndarray[Any, Any]]:
    """Input batches out of an array (N, ...), a mapping of such arrays by input, or an iterable of either."""
    if isinstance(data, np.ndarray | Mapping) or hasattr(data, "numpy"):
        yield data if isinstance(data, Mapping) else np.asarray(data)
        return
    for batch in data:
        if isinstance(batch, Mapping):
            yield {name: np.asarray(value) for name, value in batch.items()}
        else:
            yield np.asarray(batch[0] if isinstance(batch, tuple | list) else batch)


class OnnxClassifier:
    """The tensor of logits of an ONNX classifier.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    output : str, optional
        Which output is meant, where there are several.

    Attributes
    ----------
    output : str
        The output.
    logits : str
        The tensor of logits: the output itself, or what goes into the Softmax that the graph ends with.
    softmax : onnx.NodeProto or None
        That Softmax.
    """

    def __init__(self, model: Any, output: str | None = None) -> None:
        self.model = model
        names = [each.name for each in model.graph.output]
        if output is None and len(names) > 1:
            raise CATValueError(
                f"the ONNX model has the outputs {', '.join(names)}; say with output= which are the logits"
            )
        if output is not None and output not in names:
            raise CATValueError(
                f"the ONNX model has no output {output!r}; its outputs are {', '.join(names)}"
            )
        self.output = output or names[0]
        makers = {name: node for node in model.graph.node for name in node.output}
        last = makers.get(self.output)
        while last is not None and last.op_type == "Identity":
            last = makers.get(last.input[0])
        self.softmax = last if last is not None and last.op_type == "Softmax" and not last.domain else None
        self.logits = self.output if self.softmax is None else self.softmax.input[0]
        self._session: Any = None

    def __call__(self, batch: Any) -> np.ndarray[Any, Any]:
        """Logits of one batch.

        Raises
        ------
        CATValueError
            When ONNX Runtime cannot load the model, or does not take the batch.
        """
        if self._session is None:
            self._session = session_of(self._with_logits())
        inputs = self._session.get_inputs()
        if not isinstance(batch, Mapping):
            if len(inputs) != 1:
                raise CATValueError(
                    f"the ONNX model has the inputs {', '.join(each.name for each in inputs)}; give mappings of arrays"
                )
            batch = {inputs[0].name: batch}
        rows = len(next(iter(batch.values())))
        fixed = inputs[0].shape[0] if inputs[0].shape else None
        step = fixed if isinstance(fixed, int) and fixed > 0 else rows
        if rows % step:
            raise CATValueError(
                f"the ONNX model takes batches of {step}; got {rows} rows, which it does not divide"
            )
        parts = []
        for start in range(0, rows, step):
            feed = {name: value[start : start + step] for name, value in batch.items()}
            try:
                parts.append(np.asarray(self._session.run([self.logits], feed)[0]))
            except Exception as error:  # its exceptions share no base class
                raise CATValueError(f"ONNX Runtime does not take the batch: {error}") from error
        return np.concatenate(parts)

    def _with_logits(self) -> Any:
        """The model with the logits as an output as well."""
        if self.softmax is None:
            return self.model
        return showing(self.model, [self.logits])


def collect(model: Any, data: Iterable[Any], role: str) -> np.ndarray[Any, Any]:
    """Run a classifier over batches and gather its logits.

    Parameters
    ----------
    model : callable
        From a batch to logits (n, C), an array or a tensor.
    data : iterable
        Batches.
    role : str
        For messages.

    Returns
    -------
    ndarray of shape (N, C), float32

    Raises
    ------
    CalibrationError
        When there is no batch, or one yields anything but finite logits of shape (n, C).
    """
    parts: list[np.ndarray[Any, Any]] = []
    for number, batch in enumerate(data):
        result = model(batch)
        logits = np.asarray(result.detach().cpu() if hasattr(result, "detach") else result)
        if logits.ndim != 2 or logits.dtype.kind != "f" or (parts and logits.shape[1] != parts[0].shape[1]):
            raise CalibrationError(
                f"the {role} model returned a {logits.dtype} array of shape {logits.shape} for batch {number}; expected "
                "floating-point logits of shape (n, C), of one C"
            )
        if not np.isfinite(logits).all():
            raise CalibrationError(
                f"the {role} model returned NaN or infinite logits for batch {number}; check it for broken inputs, or "
                "the quantization for an overflow"
            )
        parts.append(logits.astype(np.float32, copy=False))
    if not parts:
        raise no_calibration_batch()
    return np.concatenate(parts)
