"""The correction as a module: parameters as buffers, one op call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cat_plugin.cluster_affine import AffineParameters
from cat_plugin.cluster_affine.families import MAPS
from cat_plugin.graph import op as _op  # noqa: F401  (registers the ops)

__all__ = ["ClusterAffineModule"]


class ClusterAffineModule(nn.Module):
    """Apply a fitted cluster-affine correction to logits.

    The arrays are float32 buffers, so that they move with ``.to(device)``, are saved by ``state_dict`` and end
    up as constants of an exported program.  Under autocast the correction still computes in float32.

    Parameters
    ----------
    parameters : AffineParameters
        A fitted correction, for example ``ClusterAffine().fit(z_q, z_fp).parameters_``.

    Attributes
    ----------
    mode : str
        ``"diagonal"``, ``"lowrank"`` or ``"full"``.
    alpha : float
        Blending factor, a constant of the graph.
    n_features : int
        Number of feature columns that :meth:`forward` expects beside the logits.

    Examples
    --------
    >>> correction = ClusterAffineModule(ClusterAffine().fit(z_q, z_fp).parameters_)  # doctest: +SKIP
    >>> logits = correction(model(x))  # doctest: +SKIP
    """

    def __init__(self, parameters: AffineParameters) -> None:
        super().__init__()
        self.mode = parameters.mode
        self.alpha = parameters.alpha
        self.n_features = parameters.n_features
        arrays = parameters.to_arrays()
        for name in parameters.map.arrays:
            # Cloned: torch.export.save cannot write an empty tensor that borrows numpy's storage.
            self.register_buffer(name, torch.from_numpy(arrays[name].astype(np.float32)).clone())

    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the corrected logits.

        Parameters
        ----------
        logits : Tensor of shape (N, C), floating point
            Of the quantized model.
        features : Tensor of shape (N, F), optional
            Only for a correction that was fitted with features.

        Returns
        -------
        Tensor of shape (N, C), of the dtype of `logits`
        """
        applied = MAPS[self.mode]
        inputs = (logits, features) if applied.takes_features else (logits,)
        buffers = (getattr(self, name) for name in applied.arrays)
        result: Tensor = getattr(torch.ops.cat, applied.op)(*inputs, *buffers, self.alpha)
        return result

    def to_parameters(self) -> AffineParameters:
        """Return the arrays as the estimator holds them (float64 copies of the float32 buffers)."""
        arrays = {name: getattr(self, name).detach().cpu().numpy() for name in MAPS[self.mode].arrays}
        return AffineParameters(mode=self.mode, alpha=self.alpha, **arrays)

    def extra_repr(self) -> str:
        """Show what the module was fitted to."""
        clusters, classes = self.get_buffer("beta").shape
        return f"mode={self.mode!r}, n_clusters={clusters}, n_classes={classes}, alpha={self.alpha:g}"
