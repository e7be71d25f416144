"""What may come in: every array passes through here once, and is refused with a message that helps."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import validate_data

from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.families import mode_names
from cat_plugin.errors import CATTypeError, CATValueError

__all__ = [
    "MODE_NAMES",
    "as_array",
    "check_features",
    "check_inputs",
    "check_mask",
    "check_options",
    "check_pair",
    "refuse_non_finite",
]


#: The modes that this package brings; :func:`check_options` knows those registered later, too.
MODE_NAMES: Final = mode_names()


def as_array(values: Any) -> Any:
    """Turn a tensor of any framework into something that numpy reads; leave the rest alone.

    Half precision is widened to float32, the half type that numpy lacks included: a sum of squares of
    float16 logits overflows.
    """
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        values = values.detach().cpu()
        if "bfloat16" in str(values.dtype):
            values = values.float()
        values = values.numpy()
    dtype = getattr(values, "dtype", None)
    if isinstance(values, np.ndarray) and (dtype == np.float16 or "bfloat16" in str(dtype)):
        return values.astype(np.float32)
    return values


def refuse_non_finite(values: FloatArray, name: str, first_row: int = 0) -> None:
    """Raise if a row holds a NaN or an infinity, and say which.

    Parameters
    ----------
    values : ndarray of shape (N, P)
        The rows.
    name : str
        What the array is called in the message.
    first_row : int, default=0
        Index of the first row in the stream, where `values` is one batch of many.

    Raises
    ------
    CATValueError
    """
    # One pass without a temporary: a sum is finite unless an element is not (or the sum overflows).
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
        finite = np.isfinite(values)
    if finite.all():
        return
    row, column = (int(i) for i in np.argwhere(~finite)[0])
    kind = "NaN" if np.isnan(values[row, column]) else "infinity"
    raise CATValueError(
        f"{name} contains {kind} in row {first_row + row}, column {column}; every value must be finite. "
        "Look for an overflow in the model that made these logits, and leave that row out."
    )


def _validated(estimator: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return validate_data(estimator, *args, **kwargs)
    except TypeError as error:
        raise CATTypeError(str(error)) from error
    except ValueError as error:
        raise CATValueError(str(error)) from error


def check_pair(
    estimator: Any, z_q: Any, z_fp: Any, *, reset: bool = True, first_row: int = 0
) -> tuple[FloatArray, FloatArray, bool]:
    """Validate logits of the quantized and of the full-precision model.

    Parameters
    ----------
    estimator : BaseEstimator
        Remembers the number (and names) of columns when `reset` is true, is compared with otherwise.
    z_q, z_fp : array-like of shape (N, C)
        `z_fp` may be one-dimensional, or a single column beside several of `z_q`.
    reset : bool, default=True
        Whether these are the first rows of a fit.
    first_row : int, default=0
        Index of the first row, for messages.

    Returns
    -------
    z_q, z_fp : ndarray of shape (N, P), (N, C), float32 or float64
    flat : bool
        Whether `z_fp` was one-dimensional.

    Raises
    ------
    CATValueError, CATTypeError
    """
    if z_fp is None:
        raise CATValueError(
            "requires y to be passed, but the target y is None: give the full-precision logits z_fp."
        )
    if hasattr(z_fp, "toarray"):
        raise CATTypeError("z_fp is sparse; logits are dense: pass z_fp.toarray().")
    if _has_non_finite(z_fp):
        # Said here, where the row is known: scikit-learn would refuse it without one.
        bad = np.asarray(as_array(z_fp))
        refuse_non_finite(bad.reshape(bad.shape[0], -1), "z_fp (y)", first_row)
    inputs, targets = _validated(
        estimator,
        as_array(z_q),
        as_array(z_fp),
        reset=reset,
        multi_output=True,
        y_numeric=True,
        dtype=[np.float64, np.float32],
        ensure_all_finite=False,
        accept_sparse=False,
    )
    flat = targets.ndim == 1
    targets = targets.reshape(targets.shape[0], -1)
    refuse_non_finite(inputs, "z_q (X)", first_row)
    refuse_non_finite(targets, "z_fp (y)", first_row)
    columns, classes = inputs.shape[1], targets.shape[1]
    if classes not in (columns, 1):
        raise CATValueError(
            f"z_q has {columns} columns and z_fp has {classes}; both are logits of the same classes and must "
            "have the same shape. Check that both models end in the same layer."
        )
    if targets.dtype != np.float32:
        targets = targets.astype(np.float64, copy=False)
    return inputs, targets, flat


def _has_non_finite(z_fp: Any) -> bool:
    """Whether scikit-learn would refuse the target before the row can be named."""
    values = as_array(z_fp)
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.ndim not in (1, 2):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return values.size > 0 and not np.isfinite(values.sum()) and not bool(np.isfinite(values).all())


def check_inputs(estimator: Any, z_q: Any) -> FloatArray:
    """Validate logits to correct; float32 and float64 are kept as they are.

    Returns
    -------
    ndarray of shape (N, P)

    Raises
    ------
    CATValueError, CATTypeError
    """
    values = as_array(z_q)
    inputs: FloatArray = _validated(
        estimator,
        values,
        reset=False,
        dtype=[np.float64, np.float32],
        ensure_all_finite=False,
        # Nothing to correct is a valid batch, as long as it has the right columns.
        ensure_min_samples=0
        if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1]
        else 1,
    )
    refuse_non_finite(inputs, "z_q (X)")
    return inputs


def check_features(features: Any, rows: int, expected: int | None = None) -> FloatArray | None:
    """Validate the further regressors.

    Parameters
    ----------
    features : array-like of shape (N, F) or None
        None where there are none.
    rows : int
        Number of rows of logits beside them.
    expected : int, optional
        Number of columns in fitting, 0 if there were none; None before fitting.

    Returns
    -------
    ndarray of shape (N, F) or None
    """
    if features is None:
        if expected:
            raise CATValueError(
                f"this correction was fitted with {expected} features and was given none; "
                "pass the same layer's output as `features`."
            )
        return None
    if expected == 0:
        raise CATValueError("this correction was fitted without features and was given some; leave them out.")
    array = np.asarray(as_array(features))
    if array.dtype.kind not in "fiu" or array.ndim != 2:
        raise CATValueError(
            f"features have dtype {array.dtype} and shape {array.shape}; expected real numbers of shape (N, F). "
            "Flatten or pool them first."
        )
    if array.shape[0] != rows:
        raise CATValueError(f"features have {array.shape[0]} rows and z_q has {rows}; they must agree.")
    if expected is not None and array.shape[1] != expected:
        raise CATValueError(
            f"features have {array.shape[1]} columns; this correction was fitted with {expected}."
        )
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    refuse_non_finite(array, "features")
    return array


def check_mask(values: Any, rows: int, name: str) -> NDArray[Any] | None:
    """Validate one value per row (a mask or group labels)."""
    if values is None:
        return None
    array = np.asarray(as_array(values))
    if array.shape != (rows,):
        raise CATValueError(f"{name} has shape {array.shape}; expected one value per row, ({rows},).")
    return array


def check_options(mode: str, n_clusters: Any, alpha: Any, n_components: Any) -> None:
    """Check the constructor's parameters, when fitting starts.

    Raises
    ------
    CATValueError
    """
    if mode not in mode_names():
        raise CATValueError(f"mode is {mode!r}; it must be one of {', '.join(mode_names())}.")
    if not isinstance(n_clusters, (int, np.integer)) or isinstance(n_clusters, bool) or n_clusters < 1:
        raise CATValueError(f"n_clusters is {n_clusters!r}; it must be an integer of at least 1.")
    if not isinstance(alpha, (int, float, np.number)) or not 0.0 <= float(alpha) <= 1.0:
        raise CATValueError(
            f"alpha is {alpha!r}; it must lie between 0 (no correction) and 1 (the full map)."
        )
    if n_components is not None and (
        not isinstance(n_components, (int, np.integer)) or isinstance(n_components, bool) or n_components < 1
    ):
        raise CATValueError(
            f"n_components is {n_components!r}; it must be an integer of at least 1, or None for no projection."
        )
