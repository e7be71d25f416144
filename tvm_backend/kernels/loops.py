"""Schedules for the loops of operators left in float on a processor: vectors inside, threads outside."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

from tvm import s_tir, tirx

__all__ = ["LANES", "scheduled"]

_log = logging.getLogger("cat_plugin")

LANES = 16
"""Most lanes of a vector; LLVM cuts it where the processor's are shorter."""

_FEWEST = 4
"""Lanes below this are not worth a vector."""

_TASK = 32768
"""Elements, or products, worth handing to a thread."""

_SAMPLE = 4096
"""The same of one sample where the size of the batch is not known; waking threads for one small sample costs more than it takes."""

_COSTLY = ("T.Let", "T.isnan", "T.exp", "T.log", "T.pow", "T.erf", "T.sqrt", "T.rsqrt", "T.sigmoid", "T.tanh")
"""What marks an expression that is not computed twice, in its text."""

_REDUCE = 2  # IterVar.CommReduce


def _number(extent: Any) -> int | None:
    value = getattr(extent, "value", extent)
    return value if isinstance(value, int) else None


def _lanes(extent: int | None) -> int:
    """The most lanes into which an extent can be cut without a rest; 1 where that is too few."""
    lanes = math.gcd(extent or 1, LANES)
    return lanes if lanes >= _FEWEST else 1


class _Block:
    """A block and what its loops are."""

    def __init__(self, sch: Any, block: Any) -> None:
        self.sch, self.block, self.body = sch, block, sch.get(block)
        self.loops = list(sch.get_loops(block))
        self.iters = list(self.body.iter_vars)
        self.reduced = [int(each.iter_type) == _REDUCE for each in self.iters]
        self.extents = [_number(each.dom.extent) for each in self.iters]

    @property
    def plain(self) -> bool:
        """Whether each loop is one of its axes, results first, and one tensor is written."""
        return (
            len(self.loops) == len(self.iters)
            and len(self.body.writes) == 1
            and self.reduced == sorted(self.reduced)
            and not all(self.reduced)
        )

    @property
    def size(self) -> int:
        """Elements computed, or products, for one sample: axes whose extent is not known count once."""
        return math.prod(extent or 1 for extent in self.extents)

    @property
    def known(self) -> bool:
        """Whether all extents are."""
        return None not in self.extents

    @property
    def placed(self) -> bool:
        """Whether one element of each tensor is read for each that is written; places that are computed are left to LLVM."""
        return all(_number(each.extent) == 1 for region in self.body.reads for each in region.region)

    def last_index_of(self, region: Any) -> Any:
        """The index along the last axis of what is read or written."""
        return region.region[-1].min if len(region.region) else None

    def follows(self, region: Any, axis: int) -> bool:
        """Whether the last index of a region is that of an axis, perhaps moved by something else."""
        index = self.last_index_of(region)
        if index is None:
            return False
        variables = [str(var.name) for var in tirx.analysis.undefined_vars(index)]
        return str(self.iters[axis].var.name) in variables


def scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Schedule a function.

    Parameters
    ----------
    function : tvm.tirx.PrimFunc
        Blocks in loops, one behind the other, as TVM's operators and its fusion make them.

    Returns
    -------
    tvm.tirx.PrimFunc
        The same computation; the function itself where it is of another form.
    """
    try:
        sch = s_tir.Schedule(function)
        root = sch.get_sblock("root")
        _inline(sch, root)
        for block in sch.get_child_blocks(root):
            _schedule(_Block(sch, block))
    except (s_tir.ScheduleError, ValueError, RuntimeError) as error:
        _log.debug("loops are left as they are: %s", str(error).splitlines()[-1:])
        return function
    # An expression that was put in place twice binds its variables twice, to different values perhaps.
    made = tirx.transform.ConvertSSA()(sch.mod)
    return made["main"].with_attr("tirx.is_scheduled", True)


def _inline(sch: Any, root: Any) -> None:
    """Compute what is read once for each element where it is read; sums, and what many elements share, stay."""
    for block in list(sch.get_child_blocks(root))[:-1]:
        this = _Block(sch, block)
        consumers = [_Block(sch, each) for each in sch.get_consumers(block)]
        if any(this.reduced) or not consumers:
            continue
        once = len(consumers) == 1 and consumers[0].size <= this.size
        if once or (
            _moves(this) and not any(any(each.reduced) and each.size > this.size for each in consumers)
        ):
            with contextlib.suppress(s_tir.ScheduleError):
                sch.compute_inline(block)


def _moves(block: _Block) -> bool:
    """Whether a block computes nothing that is worth keeping."""
    body = block.body.body
    return isinstance(body, tirx.BufferStore) and not any(name in str(body.value) for name in _COSTLY)


def _schedule(block: _Block) -> None:
    if not block.plain:
        return
    spatial = block.reduced.index(True) if any(block.reduced) else len(block.loops)
    if any(block.reduced):
        _sums(block, spatial)
    else:
        _elements(block)


def _elements(block: _Block) -> None:
    sch, loops = block.sch, block.loops
    last = len(loops) - 1
    lanes = _lanes(block.extents[last])
    if block.follows(block.body.writes[0], last) and block.placed and lanes > 1:
        loops[last:] = sch.split(loops[last], factors=[None, lanes])
        sch.vectorize(loops.pop())
    _threads(block, loops)


def _sums(block: _Block, spatial: int) -> None:
    sch, loops, last = block.sch, block.loops, spatial - 1
    sums = loops[spatial:]
    lanes = _lanes(block.extents[last])
    reads = [region for region in block.body.reads if len(region.region)]
    along = [block.follows(region, last) for region in reads]
    if block.follows(block.body.writes[0], last) and any(along) and lanes > 1:
        outer, inner = sch.split(loops[last], factors=[None, lanes])
        sch.reorder(outer, *sums, inner)
        sch.vectorize(inner)
        _threads(block, [*loops[:last], outer])
        sch.decompose_reduction(block.block, sums[0])
        return
    lanes = _lanes(block.extents[-1])
    if 1 < lanes < (block.extents[-1] or 0) and any(
        block.follows(region, len(block.iters) - 1) for region in reads
    ):
        # Sums of every 16th element, then the sum of these.
        _, inner = sch.split(sums[-1], factors=[None, lanes])
        parts = sch.rfactor(inner, spatial)
        loops = list(sch.get_loops(block.block))[:spatial]
        sch.compute_at(parts, loops[-1])
        inner, *rest = list(sch.get_loops(parts))[spatial:]
        sch.reorder(*rest, inner)
        sch.vectorize(inner)
        _threads(block, loops)
        sch.decompose_reduction(parts, rest[0])
        return
    _threads(block, loops[:spatial])


def _threads(block: _Block, loops: list[Any]) -> None:
    """Hand the outer loops to threads where there is enough to do."""
    if not loops or block.size < (_TASK if block.known else _SAMPLE):
        return
    sch, left = block.sch, block.size
    outer: list[Any] = []
    for loop, extent in zip(loops, block.extents, strict=False):
        if outer and left < 2 * _TASK:
            break
        outer.append(loop)
        left //= extent or 1
    chosen = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    if left < _TASK:
        chosen, _ = sch.split(chosen, factors=[None, -(-_TASK // max(1, left))])
    sch.parallel(chosen)
