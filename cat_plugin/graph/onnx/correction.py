"""CAT for classifiers that somebody else quantized: fit from pairs of logits, and append the step to their ONNX file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.cluster_affine import AffineParameters, ClusterAffine
from cat_plugin.errors import CalibrationError, CATTypeError, CATValueError, ExportError
from cat_plugin.graph.onnx.files import need, read_model, write_model
from cat_plugin.graph.onnx.sessions import OnnxClassifier, batches_of, collect
from cat_plugin.graph.onnx.step import Fragment, write_step

__all__ = ["append_step", "correct_logits", "correct_onnx"]

_log = logging.getLogger("cat_plugin")

#: What a corrected file's metadata say of it.
MARK = ("corrected_by", "cat-ptq")

Source = str | os.PathLike[str] | Callable[[Any], Any] | np.ndarray[Any, Any]


def correct_logits(
    quantized: Source,
    reference: Source,
    data: Any = None,
    estimator: ClusterAffine | None = None,
    *,
    output: str | None = None,
    reference_output: str | None = None,
) -> ClusterAffine:
    """Fit the correction to two classifiers, whatever runs them.

    Parameters
    ----------
    quantized, reference : path, callable or array of shape (N, C)
        An ONNX file, which ONNX Runtime runs; a function from a batch to logits (n, C); or logits that are known
        already, row by row of the same samples. Of a file that ends with a Softmax, what goes into it is taken.
    data : array, mapping of arrays by input, or iterable of either, optional
        Input batches without labels; read once. Not needed for two arrays.
    estimator : ClusterAffine, optional
        Fitted in place; ``ClusterAffine(random_state=0)`` by default.
    output : str, optional
        The files' output that is meant, where there are several.
    reference_output : str, optional
        The reference's, where it bears another name.

    Returns
    -------
    ClusterAffine
        Fitted: ``predict`` corrects logits, :func:`append_step` puts the step at the end of an ONNX file.

    Raises
    ------
    CalibrationError
        When there are no data, or a classifier gives anything but finite logits of one shape.
    CATValueError, CATTypeError
        When a file cannot be read or run, or an argument is of another kind.

    References
    ----------
    arXiv:2509.26277, section on fitting.
    """
    given = {"quantized": quantized, "reference": reference}
    arrays = {role: side for role, side in given.items() if isinstance(side, np.ndarray)}
    batches: list[Any] = []
    if len(arrays) < 2:
        if data is None:
            raise CATValueError("data is missing; give the input batches that both classifiers are run on")
        batches = list(batches_of(data))
    meant = {"quantized": output, "reference": reference_output or output}
    logits = {
        role: arrays[role] if role in arrays else collect(_runner(side, role, meant[role]), batches, role)
        for role, side in given.items()
    }
    z_q, z_fp = logits["quantized"], logits["reference"]
    if z_q.shape != z_fp.shape:
        raise CalibrationError(
            f"the quantized classifier gave logits of shape {z_q.shape} and the reference of shape {z_fp.shape}; both "
            "must classify the same samples into the same classes"
        )
    if _probabilities(z_q) != _probabilities(z_fp):
        raise CalibrationError(
            "one classifier gives probabilities (rows that sum to one) and the other logits; give both without their "
            "last Softmax"
        )
    fitted = ClusterAffine(random_state=0) if estimator is None else estimator
    return fitted.fit(z_q, z_fp)


def _runner(side: Source, role: str, output: str | None) -> Callable[[Any], Any]:
    if isinstance(side, str | os.PathLike):
        return OnnxClassifier(read_model(side), output)
    if callable(side):
        return side
    raise CATTypeError(
        f"{role} is a {type(side).__name__}; expected the path of an ONNX file, a function from a batch to logits, or "
        "an array of logits"
    )


def _probabilities(values: np.ndarray[Any, Any]) -> bool:
    return bool((values >= 0).all() and np.abs(values.sum(axis=1) - 1).max() < 1e-2)


def append_step(
    quantized: str | os.PathLike[str],
    correction: ClusterAffine | AffineParameters,
    out: str | os.PathLike[str],
    *,
    output: str | None = None,
) -> Path:
    """Append a fitted correction to an ONNX classifier, keeping every node and weight of it byte for byte.

    Parameters
    ----------
    quantized : path
        The classifier.
    correction : ClusterAffine or AffineParameters
        Fitted on its logits.
    out : path
        The file to write. It may be `quantized` itself.
    output : str, optional
        The output to correct, where there are several.

    Returns
    -------
    pathlib.Path
        Absolute. In place of the output there is one of its name with ``_corrected`` behind; a Softmax that the graph
        ends with is applied to the corrected logits.

    Raises
    ------
    CATValueError
        When the file cannot be read, the output is unknown, or the number of classes is not that of the correction.
    ExportError
        When the result cannot be written, or `out` is not beside weights that lie in files of their own.
    """
    onnx = need("onnx")
    parameters = correction.parameters_ if isinstance(correction, ClusterAffine) else correction
    if parameters.n_features:
        raise CATValueError(
            f"the correction takes {parameters.n_features} features beside the logits, which an ONNX file does not name; "
            "fit one without features"
        )
    model = read_model(quantized, weights=False)
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer) and (
        Path(out).absolute().parent != Path(quantized).absolute().parent
    ):
        raise ExportError(
            f"{quantized} keeps weights in a file beside it; write the result to the same directory, {out} is elsewhere"
        )
    classifier = OnnxClassifier(model, output)
    graph = model.graph
    place = [each.name for each in graph.output].index(classifier.output)
    kind = graph.output[place].type.tensor_type
    classes = kind.shape.dim[1].dim_value if len(kind.shape.dim) == 2 else 0
    if classes and classes != parameters.n_classes:
        raise CATValueError(
            f"the correction was fitted on {parameters.n_classes} classes and output {classifier.output!r} has {classes}"
        )
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset < 7:
        raise CATValueError(f"{quantized} has opset {opset}; the step needs 7 or later, convert the file")
    fragment = Fragment(_prefix(graph))
    floats = onnx.TensorProto.FLOAT
    half = kind.elem_type not in (0, floats)
    logits = fragment.emit("Cast", [classifier.logits], "logits", to=floats) if half else classifier.logits
    result = write_step(fragment, parameters, logits)
    if half:
        result = fragment.emit("Cast", [result], "result", to=kind.elem_type)
    if classifier.softmax is not None:
        softmax = onnx.NodeProto()
        softmax.CopyFrom(classifier.softmax)
        softmax.name, softmax.input[0], softmax.output[0] = f"{fragment.prefix}softmax", result, "unnamed"
        fragment.nodes.append(softmax)
    # The last node bears the output's new name.
    name = f"{classifier.output}_corrected"
    fragment.nodes[-1].output[0] = name
    graph.node.extend(fragment.nodes)
    graph.initializer.extend(fragment.initializers)
    graph.output[place].name = name
    if not any(each.key == MARK[0] for each in model.metadata_props):
        model.metadata_props.add(key=MARK[0], value=MARK[1])
    return write_model(model, out)


def _prefix(graph: Any) -> str:
    """What the names of the step start with; no name of the graph does."""
    names = {name for node in graph.node for name in (*node.input, *node.output, node.name)}
    prefix = "cat_"
    while any(name.startswith(prefix) for name in names):
        prefix = f"_{prefix}"
    return prefix


def correct_onnx(
    quantized: str | os.PathLike[str],
    reference: Source,
    data: Any,
    out: str | os.PathLike[str],
    estimator: ClusterAffine | None = None,
    *,
    output: str | None = None,
    reference_output: str | None = None,
) -> ClusterAffine:
    """Correct an ONNX classifier that somebody else quantized.

    Parameters
    ----------
    quantized : path
        The quantized classifier, of any quantizer.
    reference : path, callable or array of shape (N, C)
        The full-precision classifier, or its logits of `data`, as in :func:`correct_logits`.
    data : array, mapping of arrays by input, or iterable of either
        Input batches without labels.
    out : path
        The corrected file to write, for any runtime.
    estimator : ClusterAffine, optional
        Fitted in place; ``ClusterAffine(random_state=0)`` by default, ``ClusterAffine.paper()`` for the paper's.
    output : str, optional
        The output that holds the logits, where there are several.
    reference_output : str, optional
        The reference's, where it bears another name.

    Returns
    -------
    ClusterAffine
        Fitted.

    Raises
    ------
    CATError
        As :func:`correct_logits` and :func:`append_step` do.
    """
    fitted = correct_logits(
        quantized, reference, data, estimator, output=output, reference_output=reference_output
    )
    append_step(quantized, fitted, out, output=output)
    _log.info("fitted the cluster-affine step to %s and wrote %s", quantized, out)
    return fitted
