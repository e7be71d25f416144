"""Fit the cluster-affine step to a pair of models and append it to the quantized one.

Works on any two modules that map the same inputs to logits of shape (N, C): the quantized one may
come from the plugin's own engine, from Neural Compressor, or from anywhere else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cat_plugin.calls import as_calls, collect_logits
from cat_plugin.errors import CalibrationError, CATTypeError
from cat_plugin.models import device_of

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


class CorrectedModule(nn.Module):
    """A quantized module followed by its cluster-affine correction.

    Parameters
    ----------
    model : torch.nn.Module
        The quantized module; its output is the logits, shape (N, C). It is put in evaluation mode.
    correction : ClusterAffineModule
        The fitted step, of the same C.
    estimator : ClusterAffine, optional
        What `correction` was fitted by; kept for inspection, not part of the state dict.

    Attributes
    ----------
    model, correction, estimator
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
        self, model: nn.Module, correction: ClusterAffineModule, estimator: ClusterAffine | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.correction = correction
        self.estimator = estimator
        self.config = None
        self.report = None
        self.export_obstacle = None
        # Exported modules refuse train() and eval(); they are in the right mode already.
        with contextlib.suppress(NotImplementedError):
            model.eval()
        self.training = False

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Corrected logits, shape (N, C)."""
        logits: torch.Tensor = self.correction(self.model(x, *args, **kwargs))
        return logits

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CorrectedModule:
        """Refuse half precision, which neither the scales of quantized weights nor the fitted map are made for."""
        dtype = fn(torch.empty(0)).dtype
        if dtype in (torch.float16, torch.bfloat16):
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
    z_q: np.ndarray,
    z_fp: np.ndarray,
    estimator: ClusterAffine | None = None,
    tuned_mask: np.ndarray | None = None,
) -> tuple[ClusterAffineModule, ClusterAffine]:
    """Fit the estimator to a pair of logits and make its module.

    Parameters
    ----------
    z_q, z_fp : numpy.ndarray
        Logits of the quantized and of the full-precision model, both (N, C), row by row of the same samples.
    estimator : ClusterAffine, optional
        Fitted in place; ``ClusterAffine(random_state=0)`` when not given, so that equal data give equal maps.
    tuned_mask : numpy.ndarray, optional
        Shape (N,), bool: rows that the quantizer was tuned on, which never judge a candidate.

    Returns
    -------
    module : ClusterAffineModule
    estimator : ClusterAffine
    """
    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

    if z_q.shape != z_fp.shape:
        raise CalibrationError(
            f"the quantized model gave logits of shape {z_q.shape} and the full-precision model of shape "
            f"{z_fp.shape} for the same calibration data; both must classify the same samples into the same classes"
        )
    estimator = ClusterAffine(random_state=0) if estimator is None else estimator
    estimator.fit(z_q, z_fp, tuned_mask=tuned_mask)
    return ClusterAffineModule(estimator.parameters_), estimator


def correct(
    quantized: nn.Module,
    reference: nn.Module,
    calibration: Iterable[Any],
    estimator: ClusterAffine | None = None,
    tuned_mask: ArrayLike | None = None,
) -> CorrectedModule:
    """Fit the cluster-affine step to a quantized module and append it.

    Both models are run once over `calibration` in evaluation mode, without gradients. Neither is changed,
    but for the quantized one staying in evaluation mode.

    Parameters
    ----------
    quantized : torch.nn.Module
        Any quantized classifier.
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

    Returns
    -------
    CorrectedModule
        With the attributes ``model`` (`quantized` itself), ``correction`` and ``estimator``.

    Raises
    ------
    CalibrationError
        When calibration is empty, or a model fails or returns anything but finite logits of shape (N, C); the
        message names the batch.
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
    z_fp = collect_logits(reference, calls, "full-precision")
    z_q = collect_logits(quantized, calls, "quantized")
    mask = None if tuned_mask is None else np.asarray(tuned_mask)
    step, fitted = fit_correction(z_q, z_fp, estimator, mask)
    _log.info("fitted the cluster-affine step to %d samples of %d classes", *z_q.shape)
    return CorrectedModule(quantized, step.to(device_of(quantized)), fitted)
