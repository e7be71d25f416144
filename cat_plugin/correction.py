"""Fit the cluster-affine step to a pair of models and append it to the quantized one.

Works on any two modules that map the same inputs to logits: the quantized one may come from the plugin's own engine, from
Neural Compressor, or from anywhere else.  Logits are the one tensor (N, C) that a classifier returns, or what the caller names
among several results; those of pixels (N, C, H, W) or tokens (N, T, C) are corrected row by row.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cat_plugin.calls import LogitRows, as_calls, collect_logits
from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.logits import LogitsOf, as_rows, from_rows
from cat_plugin.models import device_of
from cat_plugin.structures import as_structure, output_names
from cat_plugin.torch_compat import pytree

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

__all__ = [
    "CorrectedModule",
    "correct",
    "fit_correction",
]

_log = logging.getLogger("cat_plugin")
_ABSENT: Any = object()


class CorrectedModule(nn.Module):
    """A quantized module followed by its cluster-affine correction.

    Parameters
    ----------
    model : torch.nn.Module
        The quantized module. It is put in evaluation mode.
    correction : ClusterAffineModule or None
        The fitted step, of as many classes as the logits have; None leaves the results as they are.
    estimator : ClusterAffine, optional
        What `correction` was fitted by; kept for inspection, not part of the state dict.
    leaf : int
        Which leaf of the module's results is the logits.
    class_axis : int
        Their axis of classes, from 1 on.

    Attributes
    ----------
    model, correction, estimator, leaf, class_axis
        As given: ``corrected.model`` is the quantized module without the correction.
    config : dict or None
        The configuration that it was made from, when a host or a recipe made it.
    report : dict or None
        The engine's report, when the engine quantized `model`.
    export_obstacle : str or None
        Why `model` cannot be exported as a graph, when that is known beforehand.
    """

    config: dict[str, Any] | None
    report: dict[str, Any] | None
    export_obstacle: str | None

    def __init__(
        self,
        model: nn.Module,
        correction: ClusterAffineModule | None,
        estimator: ClusterAffine | None = None,
        leaf: int = 0,
        class_axis: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.correction = correction
        self.estimator = estimator
        self.leaf, self.class_axis = leaf, class_axis
        self.config = None
        self.report = None
        self.export_obstacle = None
        # Exported modules refuse train() and eval(); they are in the right mode already.
        with contextlib.suppress(NotImplementedError):
            model.eval()
        self.training = False

    def forward(self, x: Any = _ABSENT, /, *args: Any, **kwargs: Any) -> Any:
        """What the quantized module returns, its logits corrected.

        Data classes and mappings that ``torch.export`` does not know come back as dicts.
        """
        # The first argument by itself, so that whoever exports the module can say which of its axes are dynamic.
        result = self.model(**kwargs) if x is _ABSENT else self.model(x, *args, **kwargs)
        if self.correction is None:
            return result
        if isinstance(result, torch.Tensor):
            return self.corrected(result)
        leaves, structure = pytree.tree_flatten(as_structure(result))
        leaves[self.leaf] = self.corrected(leaves[self.leaf])
        return pytree.tree_unflatten(leaves, structure)

    @property
    def signature(self) -> inspect.Signature:
        """The arguments of :attr:`model`, by which exported graphs name their inputs."""
        return inspect.signature(self.model.forward)

    @property
    def output_names(self) -> list[str] | None:
        """What :attr:`model` calls its results, where it says so."""
        return output_names(self.model)

    def logits_of(self, result: Any) -> torch.Tensor:
        """The logits among the results of :attr:`model` or of the module itself."""
        logits: torch.Tensor = pytree.tree_leaves(as_structure(result))[self.leaf]
        return logits

    def corrected(self, logits: torch.Tensor) -> torch.Tensor:
        """Corrected logits, of the shape of `logits`: (N, C), or (N, ..., C, ...) with the classes along `class_axis`."""
        if self.correction is None:
            return logits
        rows: torch.Tensor = self.correction(as_rows(logits, self.class_axis))
        return from_rows(rows, logits, self.class_axis)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CorrectedModule:
        """Refuse other precisions, which neither the scales of quantized weights nor the fitted map are made for."""
        dtype = fn(torch.empty(0, dtype=torch.float32)).dtype
        if dtype != torch.float32:
            raise CATTypeError(
                f"a corrected module cannot be converted to {str(dtype).removeprefix('torch.')}: its quantized weights are "
                "integers with float32 scales, and its fitted map is float32. Leave it as it is."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> CorrectedModule:
        """Refuse training; a no-op for ``mode=False``, since a quantized module only evaluates."""
        if mode:
            raise CATTypeError(
                "a corrected module cannot be put in training mode: its quantized weights and its fitted map "
                "are constants. Train the full-precision model, then quantize and correct it again."
            )
        return self


def fit_correction(
    quantized: nn.Module,
    z_q: LogitRows,
    z_fp: LogitRows,
    estimator: ClusterAffine | None = None,
    tuned_mask: np.ndarray | None = None,
) -> CorrectedModule:
    """Fit the estimator to a pair of logits and append its module.

    Parameters
    ----------
    quantized : torch.nn.Module
        What is corrected.
    z_q, z_fp : LogitRows
        Logits of the quantized and of the full-precision model, row by row of the same samples.
    estimator : ClusterAffine, optional
        Fitted in place; ``ClusterAffine(random_state=0)`` when not given, so that equal data give equal maps.
    tuned_mask : numpy.ndarray, optional
        Shape (N,), bool: samples that the quantizer was tuned on, whose rows never judge a candidate.

    Returns
    -------
    CorrectedModule
    """
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

    if z_q.values.shape != z_fp.values.shape:
        raise CalibrationError(
            f"the quantized model gave logits of shape {z_q.values.shape} and the full-precision model of shape "
            f"{z_fp.values.shape} for the same calibration data; both must classify the same samples into the same classes"
        )
    estimator = ClusterAffine(random_state=0) if estimator is None else estimator
    if tuned_mask is not None and tuned_mask.shape == (
        z_q.samples[-1] + 1,
    ):  # else the estimator says what is wrong
        tuned_mask = tuned_mask[z_q.samples]
    estimator.fit(z_q.values, z_fp.values, tuned_mask=tuned_mask)
    _log.info("fitted the cluster-affine step to %d rows of %d classes", *z_q.values.shape)
    step = ClusterAffineModule(estimator.parameters_).to(device_of(quantized))
    return CorrectedModule(quantized, step, estimator, z_q.leaf, z_q.class_axis)


def correct(
    quantized: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any],
    estimator: ClusterAffine | None = None,
    tuned_mask: ArrayLike | None = None,
    *,
    logits: str | int | None = None,
    class_axis: int | None = None,
) -> CorrectedModule:
    """Fit the cluster-affine step to a quantized module and append it.

    Both models are run once over `calibration` in evaluation mode, without gradients. Neither is changed,
    but for the quantized one staying in evaluation mode.

    Parameters
    ----------
    quantized : torch.nn.Module
        Any quantized model that returns logits.
    reference : torch.nn.Module
        The full-precision model that it was made from.
    calibration : iterable
        Input batches: tensors or arrays (N, ...), tuples and lists whose first item is the inputs, or mappings of
        keyword arguments; or one tensor of all inputs. No labels are used. See :mod:`cat_plugin.batches`.
    estimator : ClusterAffine, optional
        What to fit, ``ClusterAffine(random_state=0)`` by default; fitted in place.
    tuned_mask : array-like of shape (N,), bool, optional
        True for the samples that `quantized` was tuned on (not merely calibrated), in the order of
        `calibration`. Its logits are closer to the reference there than on new data, so these samples never
        judge a candidate, where there are others.
    logits : str or int, optional
        Which result is the logits, where a model returns several: key, field or number, with dots between (``logits``,
        ``1``, ``aux.0``); ``output`` for a single tensor.  Only that one is corrected.
    class_axis : int, optional
        Axis of their classes; by default 1 in (N, C) and (N, C, H, W), and the last in (N, T, C).  Rows are pixels or
        tokens then, of which at most 65536 are fitted to, drawn with a fixed seed.

    Returns
    -------
    CorrectedModule
        With the attributes ``model`` (`quantized` itself), ``correction`` and ``estimator``.

    Raises
    ------
    CalibrationError
        When calibration is empty, or a model fails or returns anything but finite logits of shape (N, C), or has no
        output of the name that `logits` gives; the message names the batch, and the nearest name.
    CATTypeError
        When an argument is of a wrong type.
    CATValueError
        When `tuned_mask` has another length than there are samples.

    References
    ----------
    "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine Transformation",
    arXiv 2509.26277, section on fitting.
    """
    for name, module in (("quantized", quantized), ("reference", reference)):
        if not isinstance(module, nn.Module):
            raise CATTypeError(
                f"{name} is a {type(module).__name__}; expected a torch.nn.Module that maps inputs to logits (N, C)"
            )
    calls = list(as_calls(calibration))
    place = LogitsOf.of({"logits": logits, "class_axis": class_axis})
    z_fp = collect_logits(reference, calls, "full-precision", logits=place)
    z_q = collect_logits(quantized, calls, "quantized", logits=place)
    mask = None if tuned_mask is None else np.asarray(tuned_mask)
    return fit_correction(quantized, z_q, z_fp, estimator, mask)
