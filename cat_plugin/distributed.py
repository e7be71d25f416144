"""The same fit over several processes, each of which sees its own part of the calibration data.

What is exchanged is small: a bounded sample of rows, sums of centroids, and the statistics of the maps.  The result is
the same on every process, and that of one process that sees all the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from cat_plugin.cluster_affine import AffineParameters, ClusterAffine
from cat_plugin.cluster_affine.rows import Rows
from cat_plugin.cluster_affine.sketch import RowSketch
from cat_plugin.errors import CATError, CATValueError

__all__ = ["DistributedParty", "fit"]

FloatArray = NDArray[np.floating[Any]]


class DistributedParty:
    """The processes of a group, reached by ``torch.distributed`` with whichever backend it was set up.

    Parameters
    ----------
    group : ProcessGroup, optional
        The default group if not given.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise CATError(
                "torch.distributed is not initialised; call torch.distributed.init_process_group first "
                "(torchrun sets the environment up for it), or use ClusterAffine.fit_batches in a single process."
            )
        self.group = group
        self.size = dist.get_world_size(group)
        self.first = dist.get_global_rank(group, 0) if group is not None else 0
        # NCCL moves CUDA tensors only.
        on_device = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array, order="C")).to(self.device)

    def total(self, array: FloatArray) -> FloatArray:
        """Return the sum of an array over all processes."""
        tensor = self._tensor(array)
        dist.all_reduce(tensor, group=self.group)
        summed: FloatArray = tensor.cpu().numpy()
        return summed

    def agree(self, array: FloatArray) -> FloatArray:
        """Return the first process's value of an array, whatever shape the others had."""
        shape = self._tensor(np.array([array.ndim, *array.shape, *[0] * (4 - array.ndim)], dtype=np.int64))
        dist.broadcast(shape, self.first, group=self.group)
        extent = shape.cpu().numpy()
        wanted = tuple(int(n) for n in extent[1 : 1 + extent[0]])
        mine = array if array.shape == wanted else np.zeros(wanted)
        tensor = self._tensor(mine.astype(np.float64))
        if tensor.numel():
            dist.broadcast(tensor, self.first, group=self.group)
        value: FloatArray = tensor.cpu().numpy()
        return value

    def widest(self, width: int) -> int:
        """Return the largest of the processes' numbers."""
        tensor = self._tensor(np.array([width], dtype=np.int64))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor.item())

    def settle(self, failure: CATError | None) -> None:
        """Raise on every process if reading failed on one of them."""
        failed = self.total(np.array([float(failure is not None)]))[0]
        if failure is not None:
            raise failure
        if failed:
            raise CATError(
                f"{int(failed)} other process(es) could not use their batches; their own error says why. "
                "No process has fitted anything."
            )

    def gather(self, sketch: RowSketch) -> RowSketch:
        """Return the union of the sketches of all processes, in the order of their ranks."""
        widths = np.zeros(3)
        if not sketch.empty:
            rows = sketch.rows()
            widths = np.array([rows.z_q.shape[1], rows.z_fp.shape[1], rows.n_features], dtype=np.float64)
        widest = np.array([self.widest(int(w)) for w in widths])
        if not widest[0]:
            raise CATValueError("no process has any row; give at least one of them a batch of logits.")
        # Every process takes part in every exchange before any of them complains.
        if self.total(np.array([float(not sketch.empty and bool((widths != widest).any()))]))[0]:
            raise CATValueError(
                f"the processes' batches differ in their columns: this one has {widths.astype(int).tolist()} of z_q, "
                f"z_fp and features, the largest are {widest.tolist()}; give every process the same model."
            )
        packed = np.zeros((0, int(widest.sum())))
        if not sketch.empty:
            columns = [rows.z_q, rows.z_fp] + ([] if rows.features is None else [rows.features])
            packed = np.concatenate(columns, axis=1)
        merged = RowSketch(sketch.limit)
        merged.seen = 0
        for part, seen in zip(
            self._gather_rows(packed), self._gather_rows(np.array([[sketch.seen]])), strict=True
        ):
            if not len(part):
                continue
            z_q, z_fp, features = np.split(part, np.cumsum(widest)[:2], axis=1)
            given = Rows(z_q, z_fp, features if features.shape[1] else None)
            merged.merge(RowSketch.of(given, sketch.limit, int(seen[0, 0])))
        return merged

    def _gather_rows(self, packed: FloatArray) -> list[FloatArray]:
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, self._tensor(np.array([len(packed)], dtype=np.int64)), group=self.group)
        longest = max(int(count.item()) for count in counts)
        padded = np.zeros((longest, packed.shape[1]))
        padded[: len(packed)] = packed
        mine = self._tensor(padded)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        if mine.numel():
            dist.all_gather(parts, mine, group=self.group)
        return [part[: int(n.item())].cpu().numpy() for part, n in zip(parts, counts, strict=True)]


def fit(
    estimator: ClusterAffine,
    batches: Iterable[Any],
    group: dist.ProcessGroup | None = None,
    *,
    sketch_rows: int | None = None,
) -> ClusterAffine:
    """Fit an estimator to the batches of all processes of a group.

    Parameters
    ----------
    estimator : ClusterAffine
        The same settings on every process; fitted in place.
    batches : iterable of (z_q, z_fp) or (z_q, z_fp, features)
        This process's part, which it must be possible to read up to three times.  It may be empty.
    group : ProcessGroup, optional
        The default group if not given.
    sketch_rows : int, optional
        Rows of the common sample; see :meth:`ClusterAffine.fit_batches`.

    Returns
    -------
    ClusterAffine
        The estimator, fitted to the same parameters on every process.

    Raises
    ------
    CATError
        If ``torch.distributed`` is not initialised.
    CATValueError
        If the batches cannot be used, or no process has any.

    Examples
    --------
    >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
    >>> correction = fit(ClusterAffine(random_state=0), my_batches)  # doctest: +SKIP
    """
    party = DistributedParty(group)
    drawn = estimator.random_state
    if drawn is None or not isinstance(drawn, (int, np.integer)):
        # Everyone takes the first process's seed; the parameter itself is left as the user set it.
        seed = np.array([float(np.random.default_rng().integers(np.iinfo(np.int32).max))])
        estimator.random_state = int(party.agree(seed)[0])
    try:
        estimator.fit_batches(batches, sketch_rows=sketch_rows, party=party)
    finally:
        estimator.random_state = drawn
    parameters = estimator.parameters_
    arrays = {name: party.agree(array) for name, array in sorted(parameters.to_arrays().items())}
    estimator.adopt_parameters(AffineParameters.from_arrays(parameters.mode, arrays))
    return estimator
