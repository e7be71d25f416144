"""What a bundle's graph says of data: its logits before and after the cluster-affine step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["both_logits"]

FloatArray = NDArray[np.floating[Any]]


def both_logits(
    program: ExportedProgram, batches: Iterable[FloatArray]
) -> tuple[FloatArray, FloatArray | None]:
    """Run a graph once and keep the logits on either side of its correction.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph; left as it is.
    batches : iterable of ndarray of shape (n, ...)
        Inputs of the graph.

    Returns
    -------
    corrected : ndarray of shape (N, C)
        What the graph returns.
    uncorrected : ndarray of shape (N, C), or None
        The logits that enter the cluster-affine step; None when it has none.
    """
    import torch

    before: list[FloatArray] = []

    class Watching(torch.fx.Interpreter):
        """Computes the graph node by node and keeps what goes into the correction."""

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("cat.cluster_affine"):
                before.append(args[0].numpy())
            return super().call_function(target, args, kwargs)

    run: Any = Watching(program.module())
    with torch.no_grad():
        corrected = [run.run(torch.from_numpy(batch)).numpy() for batch in batches]
    return np.concatenate(corrected), np.concatenate(before) if before else None
