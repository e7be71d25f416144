"""Fit the cluster-affine step to a pair of models and append it to the quantized one.

Works on any two modules that map the same inputs to logits of shape (N, C): the quantized one may
come from the plugin's own engine, from Neural Compressor, or from anywhere else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cat_plugin.errors import CalibrationError, CATTypeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from cat_plugin.cluster_affine import ClusterAffine
    from cat_plugin.graph.module import ClusterAffineModule

__all__ = [
    "CorrectedModule",
    "ModelCall",
    "as_calls",
    "check_logits",
    "collect_logits",
    "correct",
    "evaluating",
    "fit_correction",
]

_log = logging.getLogger("cat_plugin")


@dataclass(frozen=True)
class ModelCall:
    """One call of a model: what it was given, kept so that another model can be given the same.

    Parameters
    ----------
    args : tuple
        Positional arguments.
    kwargs : dict, optional
        Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> ModelCall:
        """The same call with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
                return type(value)(move(item) for item in value)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value

        return ModelCall(tuple(move(arg) for arg in self.args), {k: move(v) for k, v in self.kwargs.items()})


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

    def train(self, mode: bool = True) -> CorrectedModule:
        """Refuse training; a no-op for ``mode=False``, since a quantized module only evaluates."""
        if mode:
            raise CATTypeError(
                "a corrected module cannot be put in training mode: its quantized weights and its fitted map "
                "are constants. Train the full-precision model, then quantize and correct it again."
            )
        return self


def as_calls(calibration: Iterable[Any]) -> Iterator[ModelCall]:
    """Read calibration batches as calls of a model.

    Parameters
    ----------
    calibration : iterable
        Of batches: a tensor; a tuple or list whose first item is the input; a mapping of keyword
        arguments; or a :class:`ModelCall`.

    Yields
    ------
    ModelCall

    Raises
    ------
    CATTypeError
        When `calibration` is not iterable, or a batch is none of these.
    """
    try:
        batches = iter(calibration)
    except TypeError:
        raise CATTypeError(
            f"calibration is a {type(calibration).__name__}, which cannot be iterated; give a DataLoader or a list "
            "of input batches"
        ) from None
    for number, batch in enumerate(batches):
        if isinstance(batch, ModelCall):
            yield batch
        elif isinstance(batch, torch.Tensor):
            yield ModelCall((batch,))
        elif isinstance(batch, Mapping):
            yield ModelCall((), dict(batch))
        elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
            yield ModelCall((batch[0],))
        else:
            raise CATTypeError(
                f"calibration batch {number} is a {type(batch).__name__}; expected a tensor, or a tuple or list whose "
                "first item is the input tensor"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode for a while, and every submodule back as it was afterwards.

    Exported modules refuse to change mode; they are left as they are.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
    except NotImplementedError:
        modes = {}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_logits(output: Any, batch: int, role: str, n_classes: int | None = None) -> torch.Tensor:
    """The output of a model as logits, or an error that names the batch.

    Parameters
    ----------
    output : object
        What the model returned.
    batch : int
        Number of the batch, from 0, for the message.
    role : str
        Which model it was, for the message.
    n_classes : int, optional
        The number of columns that earlier batches had.

    Returns
    -------
    torch.Tensor
        Shape (N, C), floating point, finite, detached.

    Raises
    ------
    CalibrationError
        When it is not a tensor, not (N, C), of another C than before, not floating point, or not finite.
    """
    if not isinstance(output, torch.Tensor):
        raise CalibrationError(
            f"the {role} model returned a {type(output).__name__} for calibration batch {batch}; the cluster-affine "
            "step works on logits, one tensor of shape (N, C). Wrap the model so that it returns them."
        )
    if output.ndim != 2 or not output.is_floating_point():
        raise CalibrationError(
            f"the {role} model returned a {output.dtype} tensor of shape {tuple(output.shape)} for calibration batch "
            f"{batch}; expected floating-point logits of shape (N, C). Wrap the model so that it returns them."
        )
    if n_classes is not None and output.shape[1] != n_classes:
        raise CalibrationError(
            f"the {role} model returned {output.shape[1]} columns for calibration batch {batch} and {n_classes} for "
            "the batches before; the number of classes must not change"
        )
    logits = output.detach()
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        rows = torch.nonzero(~finite.all(dim=1)).flatten().tolist()
        raise CalibrationError(
            f"the {role} model returned NaN or infinite logits for calibration batch {batch}, in {len(rows)} of "
            f"{len(logits)} rows (the first is row {rows[0]}); check that batch for broken inputs, or the "
            "quantization for an overflow"
        )
    return logits


def collect_logits(
    model: nn.Module, calls: Iterable[ModelCall], role: str, progress: Any | None = None
) -> np.ndarray:
    """Run a model over calibration calls and gather its logits.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode, without gradients, on the device that its parameters are on.
    calls : iterable of ModelCall
        The inputs.
    role : str
        ``"full-precision"`` or ``"quantized"``, for messages.
    progress : object with ``update(n)``, optional
        Told of every batch done.

    Returns
    -------
    numpy.ndarray
        Shape (N, C), float32 (float64 where the model computes in it).

    Raises
    ------
    CalibrationError
        When there is no batch, or one yields what :func:`check_logits` refuses.
    """
    parts: list[np.ndarray] = []
    n_classes: int | None = None
    place = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), None)
    with torch.no_grad(), evaluating(model):
        for number, call in enumerate(calls):
            here = call.to(place) if place is not None else call
            logits = check_logits(model(*here.args, **here.kwargs), number, role, n_classes)
            n_classes = logits.shape[1]
            if logits.dtype not in (torch.float32, torch.float64):
                logits = logits.float()
            parts.append(logits.cpu().numpy())
            if progress is not None:
                progress.update(1)
    if not sum(len(part) for part in parts):
        raise CalibrationError(
            "the calibration data yielded no sample; give an iterable with at least one batch (a generator that was "
            "read before is empty the second time)"
        )
    return np.concatenate(parts)


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
        Input batches: tensors, or tuples and lists whose first item is the input. No labels are used.
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
        When calibration is empty, or a model returns anything but finite logits of shape (N, C); the
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
    step = step.to(
        next((t.device for t in [*quantized.parameters(), *quantized.buffers()]), torch.device("cpu"))
    )
    return CorrectedModule(quantized, step, fitted)
