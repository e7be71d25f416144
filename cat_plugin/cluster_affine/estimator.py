"""The estimator: fit on two sets of logits, correct a third."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils.validation import check_is_fitted

from cat_plugin.cluster_affine import validation
from cat_plugin.cluster_affine._typing import FloatArray
from cat_plugin.cluster_affine.batches import CheckedBatches, feed
from cat_plugin.cluster_affine.fitting import Party, Plan, Settings, fit_stream
from cat_plugin.cluster_affine.pairing import Columns, pair
from cat_plugin.cluster_affine.parameters import AffineParameters
from cat_plugin.cluster_affine.selection import in_words
from cat_plugin.cluster_affine.sketch import row_limit
from cat_plugin.cluster_affine.stream import StreamState
from cat_plugin.errors import CATError, CATValueError

__all__ = ["ClusterAffine"]

logger = logging.getLogger("cat_plugin")

#: Rows of an array in memory that are handled at a time once it is too large for the sample.
_SLICE_ROWS = 8192


class ClusterAffine(TransformerMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Map logits of a quantized model to those of its full-precision original, cluster by cluster.

    Parameters
    ----------
    mode : {"auto", "paper", "diagonal", "lowrank", "full"}, default="auto"
        ``paper`` is the published method without any addition.  ``diagonal`` (a slope and an offset per class),
        ``lowrank`` (besides, a low-rank matrix in principal components; for many classes) and ``full`` (a matrix;
        for few classes) shrink each cluster's map to the global one and that to the identity, with strengths
        chosen by generalised cross-validation.  ``auto`` compares all of these, the identity and full maps
        refined by divergence in k-fold cross-validation on the calibration rows and keeps the best.
    n_clusters : int, default=64
        Number of clusters K; in ``auto`` mode an upper bound.  Reduced, with a warning, where there are fewer rows.
    alpha : float, default=0.4
        Blending factor between the logits (0) and their image (1); in ``auto`` mode one candidate among others.
    n_components : int or None, default=None
        Principal components in which rows are clustered.  None: the logits themselves, except that ``lowrank``
        takes half the classes, at most 50, and that ``auto`` tries several.
    random_state : int, RandomState instance or None, default=None
        Seed of k-means and of the folds.  With an integer a fit is deterministic.

    Attributes
    ----------
    parameters_ : AffineParameters
        The fitted arrays, named as the arguments of the op that applies them.
    cv_results_ : dict of str to ndarray
        ``auto`` mode: every candidate with its scores on each held-out fold, in scikit-learn's layout.  The metrics
        are ``kl`` (divergence from the full-precision distribution at 0.3 times the spread of its logits, so that
        it does not depend on their scale), ``agreement`` (share of rows given the full-precision model's class),
        ``confidence`` and ``mse``.
    best_index_ : int
        ``auto`` mode: row of the winner in `cv_results_`.
    best_params_ : dict
        ``auto`` mode: the winner.
    n_rows_seen_ : int
        Rows that the fit has used.
    n_features_in_ : int
        Columns of the logits.

    See Also
    --------
    cat_plugin.distributed.fit : The same over several processes.

    Notes
    -----
    Logits of rows that the quantizer was tuned on are closer to the original than those of new data.  Give such
    rows as `tuned_mask` of :meth:`fit`: they are never used to judge a candidate, and it is judged whether they
    help in fitting.  The best split keeps a few hundred rows away from the quantizer.

    A full-precision target of one column beside several columns of `z_q` is allowed, as scikit-learn's tools expect
    of a regressor: the first column is then the logit and the others are features.

    References
    ----------
    "CAT: Post-Training Quantization Error Reduction via Cluster-based Affine Transformation", arXiv:2509.26277.

    Examples
    --------
    >>> import numpy as np
    >>> from cat_plugin.cluster_affine import ClusterAffine
    >>> rng = np.random.default_rng(0)
    >>> z_fp = 4 * rng.normal(size=(400, 5))
    >>> z_q = 0.5 * z_fp @ (np.eye(5) + 0.3) + 0.4 * rng.normal(size=(400, 5))
    >>> corrected = ClusterAffine(random_state=0).fit(z_q[:300], z_fp[:300]).predict(z_q[300:])
    >>> bool(np.mean((corrected - z_fp[300:]) ** 2) < np.mean((z_q[300:] - z_fp[300:]) ** 2))
    True
    """

    n_features_in_: int
    n_rows_seen_: int
    cv_results_: dict[str, Any]
    best_index_: int
    best_params_: dict[str, Any]
    _parameters: AffineParameters | None
    _stream: StreamState
    _columns: Columns

    def __init__(
        self,
        mode: str = "auto",
        n_clusters: int = 64,
        alpha: float = 0.4,
        n_components: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.mode = mode
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.n_components = n_components
        self.random_state = random_state

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the published method: 64 clusters of the logits, closed form, alpha 0.4, no PCA.

        Parameters
        ----------
        **overrides
            Constructor parameters to change, such as ``n_components=50`` of the paper's ablations.

        Returns
        -------
        ClusterAffine

        References
        ----------
        arXiv:2509.26277, experimental settings.
        """
        settings: dict[str, Any] = {"mode": "paper", "n_clusters": 64, "alpha": 0.4, "random_state": 0}
        return cls(**(settings | overrides))

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        features: ArrayLike | None = None,
        tuned_mask: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Fit to the logits of both models on the same inputs.

        Parameters
        ----------
        X : array-like of shape (N, C)
            Logits z_q of the quantized model.
        y : array-like of shape (N, C)
            Logits z_fp of the full-precision model.
        features : array-like of shape (N, F), optional
            Further regressors, such as the quantized model's penultimate layer; then :meth:`predict` needs them too.
        tuned_mask : array-like of shape (N,), bool, optional
            True for rows that the quantizer was tuned on.
        groups : array-like of shape (N,), optional
            Rows of one group (crops of one image, for instance) are never on both sides of a fold.

        Returns
        -------
        ClusterAffine
            The estimator itself.

        Raises
        ------
        CATValueError
            If the arrays do not fit each other or hold a NaN or an infinity.
        """
        settings = Settings.of(self)
        rows, self._columns = pair(self, X, y, features)
        tuned = validation.check_mask(tuned_mask, len(rows), "tuned_mask")
        grouping = validation.check_mask(groups, len(rows), "groups")
        rows = replace(rows, tuned=None if tuned is None else tuned.astype(bool), groups=grouping)
        self._warn_of_few(len(rows))
        self._forget()
        parameters, plan, seen = fit_stream(lambda: rows.slices(_SLICE_ROWS), settings, row_limit(rows.width))
        self._keep(parameters, plan, seen)
        return self

    def fit_batches(
        self, batches: Iterable[Any], *, sketch_rows: int | None = None, party: Party | None = None
    ) -> Self:
        """Fit to batches in memory that does not grow with their number.

        Parameters
        ----------
        batches : iterable of (z_q, z_fp) or (z_q, z_fp, features)
            Read up to three times if it can be read again (a list, a data loader).  An iterator that can be read
            only once is fed to :meth:`partial_fit` instead.
        sketch_rows : int, optional
            Rows kept for clustering and for choosing between candidates; by default about 50 MB of them, at most
            16384.  A fit to no more rows than that equals :meth:`fit`.
        party : Party, optional
            Other processes that fit to other batches at the same time; see :func:`cat_plugin.distributed.fit`.

        Returns
        -------
        ClusterAffine
            The estimator itself.

        Raises
        ------
        CATValueError
            If there are no rows, or a batch cannot be used; the message says which row of the stream.
        """
        settings = Settings.of(self)
        self._forget()
        if iter(batches) is batches:
            if party is not None:
                raise CATValueError(
                    "the batches can be read only once, and fitting over several processes reads them up to three "
                    "times; pass a list or a data loader."
                )
            feed(self, batches, sketch_rows)
            return self

        reader = CheckedBatches(self, batches)
        try:
            width = reader.width()
        except CATError:
            if party is None:
                raise
            # The pass over all batches meets it again, and tells the other processes.
            width = 0
        if party is not None:
            width = party.widest(width)
        elif not width:
            raise CATValueError("the batches held no rows; give at least one batch of logits.")
        parameters, plan, seen = fit_stream(reader, settings, sketch_rows or row_limit(width), party)
        if reader.columns is None:
            # All rows were another process's.
            self.n_features_in_ = plan.bench.rows.z_q.shape[1]
        self._columns = reader.columns or Columns.of(plan.bench.rows)
        self._warn_of_few(seen)
        self._keep(parameters, plan, seen)
        return self

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        features: ArrayLike | None = None,
        sketch_rows: int | None = None,
    ) -> Self:
        """Add a batch to those before.

        Up to `sketch_rows` rows are kept, and the result is that of :meth:`fit` on all of them.  After that the
        clusters and the choice between candidates stand, and further batches add to the statistics of the maps.
        The maps are computed when they are asked for.

        Parameters
        ----------
        X, y : array-like of shape (N, C)
            Logits of the quantized and of the full-precision model.
        features : array-like of shape (N, F), optional
            As in :meth:`fit`.
        sketch_rows : int, optional
            As in :meth:`fit_batches`.

        Returns
        -------
        ClusterAffine
            The estimator itself.
        """
        stream = self._stream if hasattr(self, "_stream") else None
        first_row = 0 if stream is None else stream.n_rows
        known = None if stream is None else self._columns
        rows, self._columns = pair(self, X, y, features, known=known, first_row=first_row)
        if stream is None:
            settings = Settings.of(self)
            self._forget()
            stream = self._stream = StreamState(settings)
        limit = sketch_rows or row_limit(rows.width)
        stream.add(rows, limit)
        self.n_rows_seen_ = stream.n_rows
        self._parameters = None
        return self

    def predict(self, X: ArrayLike, features: ArrayLike | None = None) -> FloatArray:
        """Return the corrected logits.

        Parameters
        ----------
        X : array-like of shape (N, C)
            Logits of the quantized model.
        features : array-like of shape (N, F), optional
            Needed if, and only if, the estimator was fitted with features.

        Returns
        -------
        ndarray of shape (N, C), float32 for float32 (or half precision) logits, else float64
        """
        check_is_fitted(self)
        inputs = validation.check_inputs(self, X)
        further = validation.check_features(features, inputs.shape[0], self._columns.extra)
        if further is not None:
            inputs = np.concatenate([inputs, further.astype(inputs.dtype, copy=False)], axis=1)
        corrected = self.parameters_.apply(inputs)
        return corrected.ravel() if self._columns.flat else corrected

    def transform(self, X: ArrayLike, features: ArrayLike | None = None) -> FloatArray:
        """Return the corrected logits, as :meth:`predict` does."""
        return self.predict(X, features)

    def score(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None, *, features: Any = None
    ) -> float:
        """Return the coefficient of determination of the corrected logits, averaged over classes.

        Parameters
        ----------
        X, y : array-like of shape (N, C)
            Logits of the quantized and of the full-precision model.
        sample_weight : array-like of shape (N,), optional
            Weight of each row.
        features : array-like of shape (N, F), optional
            As in :meth:`predict`.

        Returns
        -------
        float
        """
        target = validation.as_array(y)
        return float(r2_score(target, self.predict(X, features), sample_weight=sample_weight))

    @property
    def parameters_(self) -> AffineParameters:
        """The fitted arrays."""
        parameters = getattr(self, "_parameters", None)
        if parameters is None:
            if not hasattr(self, "_stream"):
                raise AttributeError("parameters_: this estimator is not fitted yet; call fit first.")
            parameters, plan = self._stream.fit()
            self._adopt(plan)
            self._parameters = parameters
        return parameters

    def adopt_parameters(self, parameters: AffineParameters) -> None:
        """Replace the fitted arrays, by those of another process for example.

        Parameters
        ----------
        parameters : AffineParameters
            Of the same columns.
        """
        self._parameters = parameters

    def __sklearn_is_fitted__(self) -> bool:
        """Whether it has been fitted to any rows."""
        return getattr(self, "_parameters", None) is not None or bool(getattr(self, "n_rows_seen_", 0))

    def __sklearn_tags__(self) -> Any:
        """Describe the estimator to scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = True
        tags.target_tags.required = True
        # A fixed mode blends by a fixed alpha; scikit-learn's check sets it to 0.01, next to no correction.
        tags.regressor_tags.poor_score = self.mode != "auto"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _warn_of_few(self, rows: int) -> None:
        if rows < self.n_clusters:
            warnings.warn(
                f"n_clusters={self.n_clusters} is more than the {rows} rows; {rows} clusters are used at most.",
                UserWarning,
                stacklevel=3,
            )

    def _forget(self) -> None:
        for name in ("_stream", "n_rows_seen_", "cv_results_", "best_index_", "best_params_"):
            if hasattr(self, name):
                delattr(self, name)
        self._parameters = None

    def _adopt(self, plan: Plan) -> None:
        if plan.results is not None and plan.best_index is not None:
            self.cv_results_ = plan.results
            self.best_index_ = plan.best_index
            self.best_params_ = plan.results["params"][plan.best_index]
            logger.info("cluster-affine correction chosen: %s", in_words(self.best_params_))

    def _keep(self, parameters: AffineParameters, plan: Plan, seen: int) -> None:
        self._adopt(plan)
        self._parameters = parameters
        self.n_rows_seen_ = seen
