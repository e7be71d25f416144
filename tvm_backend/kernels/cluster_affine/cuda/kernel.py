"""The cluster-affine step on a CUDA device: two kernels, between which the batch size decides.

*Few rows*: a block of eight warps for each row.  A warp sums along the contiguous axis of one component or centroid
at a time, so that loads coalesce; shuffles finish the sums.

*Many rows*: a block of eight warps for 32 rows.  The projection (or, without one, the distances) is a tiled product
whose long axis is shared among the warps: each warp holds the whole 32 x 64 tile of sums in registers, sees an eighth of
each chunk, and the eight tiles are added at the end.  The next chunk is on its way from memory while the warps
multiply.  Distances, argmin and the affine map then go by rows, four to a warp.

Rows are read twice and written once; the second reading comes from the second-level cache.
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from cat_plugin.errors import CompileError
from tvm_backend.kernels import tir
from tvm_backend.kernels.cluster_affine.cuda.emitter import SHARED, WARPS
from tvm_backend.kernels.cluster_affine.cuda.row import RowKernel
from tvm_backend.kernels.cluster_affine.cuda.tile import TileKernel, fits_tile
from tvm_backend.kernels.cluster_affine.spec import OPAQUE, ClusterAffineSpec

__all__ = ["FEW_ROWS", "build", "fits_tile"]

FEW_ROWS = 264
"""Up to two blocks for each of an H100's 132 multiprocessors, a row has a block of its own."""


def build(spec: ClusterAffineSpec) -> PrimFunc:
    """Write the function.

    Parameters
    ----------
    spec : ClusterAffineSpec
        What to compute.

    Returns
    -------
    tvm.tirx.PrimFunc
        Private; arguments as in :meth:`ClusterAffineSpec.arguments`.

    Raises
    ------
    CompileError
        A row that does not fit into shared memory.
    """
    corrected = spec.n_classes if spec.finish != "logits" else 0
    need = 4 * (spec.width + spec.n_clusters + spec.n_components + spec.rank + 1 + corrected)
    if need > SHARED:
        raise CompileError(
            f"a row of {spec.width} values with {spec.n_clusters} distances takes {need} bytes of shared memory; "
            f"the CUDA kernel has {SHARED}"
        )
    with tir.Function(private=True, op_pattern=OPAQUE) as function:
        batch = tir.batch_extent(spec.batch)
        arguments = spec.sized(batch)
        buffers = function.buffers(arguments)
        arg = {name: buffer for (name, _, _), buffer in zip(arguments, buffers, strict=True)}
        # With a sum for each warp of a narrow row TVM 0.27 wants to add barriers, which it cannot under a condition.
        narrow = spec.width < 32 and WARPS in (spec.n_components, spec.n_clusters)
        tile = fits_tile(spec) and not narrow

        def few() -> None:
            RowKernel(spec, arg, batch).emit()

        def many() -> None:
            TileKernel(spec, arg, batch).emit()

        tir.branch(batch <= FEW_ROWS if tile else True, few, many)
    return function.result
