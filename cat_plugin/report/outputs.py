"""What a bundle's graph says of data: its logits before and after the cluster-affine step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cat_plugin.errors import CATValueError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["both_logits"]

FloatArray = NDArray[np.floating[Any]]


def both_logits(
    program: ExportedProgram, batches: Iterable[FloatArray | tuple[FloatArray, ...]]
) -> tuple[FloatArray, FloatArray | None]:
    """Run a graph once and keep the logits on either side of its correction.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        A QDQ graph; left as it is.
    batches : iterable of ndarray of shape (n, ...), or of tuples of such
        Inputs of the graph, in their order where there are several.

    Returns
    -------
    corrected : ndarray of shape (N, C) or (N, ..., C, ...)
        Of the output that is corrected, or of the only one.
    uncorrected : ndarray of the same shape, or None
        The logits that enter the cluster-affine step; None when there is none.

    Raises
    ------
    CATValueError
        The graph has several outputs, and corrects none.
    """
    import torch

    from cat_plugin.graph.inspect import find_correction, signature
    from cat_plugin.logits import from_rows
    from cat_plugin.torch_compat import pytree

    names = [entry["name"] for entry in signature(program)["outputs"]]
    step = find_correction(program)
    place = None if step is None else step.output
    if place is None and len(names) > 1:
        raise CATValueError(
            f"the model returns {', '.join(names)} and corrects none of them, so that it is not known which is the logits; "
            "evaluate it by a script of your own"
        )
    before: list[Any] = []
    after: list[Any] = []

    class Watching(torch.fx.Interpreter):
        """Computes the graph node by node and keeps what goes into the correction."""

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("cat.cluster_affine"):
                before.append(args[0])
            return super().call_function(target, args, kwargs)

    run: Any = Watching(program.module())
    with torch.no_grad():
        for batch in batches:
            given = batch if isinstance(batch, tuple) else (batch,)
            found = pytree.tree_leaves(run.run(*map(torch.from_numpy, given)))
            after.append([leaf for leaf in found if isinstance(leaf, torch.Tensor)][place or 0])
    corrected = np.concatenate([each.numpy() for each in after])
    if not before or step is None or step.class_axis is None:
        return corrected, np.concatenate([each.numpy() for each in before]) if before else None
    plain = [from_rows(rows, z, step.class_axis).numpy() for rows, z in zip(before, after, strict=True)]
    return corrected, np.concatenate(plain)
