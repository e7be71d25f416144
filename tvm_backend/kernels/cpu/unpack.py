"""Sub-byte weights to int8, in registers: one shift, one mask and one addition a vector."""

from __future__ import annotations

from typing import Any

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.packing import WeightLayout
from tvm_backend.kernels.tir import Expr

__all__ = ["lowest_values", "unpack_block", "unpacked"]


def lowest_values(layout: WeightLayout, packed: Any, block: Expr, span: Expr = 0) -> Any:
    """Load what is added to the codes of a block, and of one of its spans; returns a register array with one vector per channel vector."""
    isa = layout.isa
    held = ir.Registers(layout.vectors, "int8", isa.unit)
    wide = f"int{8 * isa.group}"
    for vector in range(layout.vectors):
        number = block if layout.spans == 1 else block * layout.spans + span
        place = layout.code_bytes + number * layout.block_channels + vector * isa.lanes
        lowest = tir.load(packed, [place], isa.lanes)
        if isa.group > 1:
            # The same byte for each of the channel's `group` weights.
            repeat = sum(1 << (8 * i) for i in range(isa.group))
            lowest = tir.cast(lowest, wide, isa.lanes) * tir.constant(repeat, wide, isa.lanes)
        held[vector] = tir.reinterpret(tir.vector("int8", isa.unit), lowest)
    return held


def unpacked(layout: WeightLayout, word: Expr, position: int, lowest: Expr) -> Expr:
    """One vector of int8 weights from a packed vector (as int32 words) that holds it at `position`."""
    words = layout.isa.unit // 4
    if position:
        word = word >> tir.constant(position * layout.bits, "int32", words)
    mask = ((1 << layout.bits) - 1) * 0x01010101
    code = word & tir.constant(mask, "int32", words)
    return tir.reinterpret(tir.vector("int8", layout.isa.unit), code) + lowest


def unpack_block(layout: WeightLayout, packed: Any, block: Expr, panel: Any, start: Expr) -> None:
    """Emit the loop that unpacks one block.

    Parameters
    ----------
    layout : WeightLayout
        How the weights are packed.
    packed : Buffer of uint8, shape (layout.length,)
        The packed weights.
    block : Expr
        Number of the block over all groups.
    panel : Buffer of int8
        Receives the ``layout.block_bytes`` weights.
    start : Expr
        Where in `panel`.
    """
    unit, share = layout.isa.unit, 8 // layout.bits
    lowest = lowest_values(layout, packed, block)
    begin = block * (layout.block_bytes // share)
    with tir.loop(layout.block_units // layout.period) as step:
        for source in range(layout.period // share):
            place = begin + (step * (layout.period // share) + source) * unit
            words = tir.vector("int32", unit // 4)
            word = ir.hold(tir.reinterpret(words, tir.load(packed, [place], unit)), "int32", unit // 4)
            for position in range(share):
                number = source * share + position
                weights = unpacked(layout, word, position, lowest[number % layout.vectors])
                tir.store(panel, weights, [start + (step * layout.period + number) * unit], unit)
