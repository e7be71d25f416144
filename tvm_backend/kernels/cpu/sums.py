"""The sums of a register tile: int32, or 16 bits that are widened to 32 every so many steps.

Where products are small, an instruction set adds up several of them in 16 bits (``InstructionSet.depth``): an addition of
words a step in the place of a widening.  The loops over the products are then cut into spans of at most that many steps.
Spans of two are written sum by sum, so that no words are held beside the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu import ir
from tvm_backend.kernels.cpu.isa import InstructionSet
from tvm_backend.kernels.tir import Expr

__all__ = ["Sums"]

_UNROLLED = 8
"""Steps of a span that are written one behind the other; the first then needs no zero to be added to."""


class Sums:
    """Sums that stay in registers while products are added to them.

    Parameters
    ----------
    isa : InstructionSet
        Multiplies and adds.
    begin : sequence of Expr
        What the sums begin with, vectors of int32.
    repeat : int
        How often all of these are there: the sum of vector `v` at place `p` has the number ``p * len(begin) + v``.
    each : int, optional
        Products that one call of a loop's body adds to a sum.
    """

    def __init__(self, isa: InstructionSet, begin: Sequence[Expr], repeat: int, each: int = 1) -> None:
        self.isa = isa
        self._span = (
            isa.depth // each if isa.depth > 1 else 0
        )  # bodies that fit into 16 bits; 0 where nothing is summed there
        self._slots = range(repeat * len(begin))
        self._fresh: set[int] = set()
        self._gathered: dict[int, list[tuple[Expr, Expr]]] | None = None
        self._held = ir.Registers(len(self._slots), "int32", isa.lanes)
        for v, value in enumerate(begin):
            for slot in self._slots[v :: len(begin)]:
                self._held[slot] = value
        if self._span:
            self._words = ir.Registers(len(self._slots), "int16", 2 * isa.lanes)

    def __getitem__(self, slot: int) -> Expr:
        return self._held[slot]

    def add(self, slot: int, activations: Expr, weights: Expr) -> None:
        """Add products to a sum."""
        if not self._span:
            self._held[slot] = self.isa.dot(self._held[slot], activations, weights)
            return
        if self._gathered is not None:
            self._gathered.setdefault(slot, []).append((activations, weights))
            return
        products = self.isa.products(activations, weights)
        self._words[slot] = products if slot in self._fresh else self._words[slot] + products
        self._fresh.discard(slot)

    def open(self, unrolled: bool = True) -> None:
        """Begin a span, whose products fit into 16 bits; `unrolled` where each is written once, not in a loop."""
        if not self._span:
            return
        if unrolled and self._span == 2:
            self._gathered = {}
            return
        self._fresh = set(self._slots) if unrolled else set()
        for slot in () if unrolled else self._slots:
            self._words[slot] = tir.constant(0, "int16", 2 * self.isa.lanes)

    def close(self) -> None:
        """End a span: widen what was added up."""
        if self._gathered is not None:
            for slot, factors in sorted(self._gathered.items()):
                words = [self.isa.products(*each) for each in factors]
                self._held[slot] = self.isa.widen(self._held[slot], sum(words[1:], words[0]))
            self._gathered = None
            return
        for slot in self._slots if self._span else ():
            self._held[slot] = self.isa.widen(self._held[slot], self._words[slot])

    @contextmanager
    def widened(self, unrolled: bool = True) -> Iterator[None]:
        """Around the products of a span."""
        self.open(unrolled)
        yield
        self.close()

    def loop(self, steps: int, body: Callable[[Expr], None]) -> None:
        """Emit ``body(step)`` for all steps, of which there may be none."""
        if not self._span or not steps:
            with tir.loop(steps) as step:
                body(step)
            return
        size = -(-steps // -(-steps // self._span))

        def piece(first: Expr, count: int) -> None:
            unrolled = count <= _UNROLLED
            with self.widened(unrolled):
                if unrolled:
                    for step in range(count):
                        body(first + step)
                else:
                    with tir.loop(count) as step:
                        body(first + step)

        full, rest = divmod(steps, size)
        if full == 1:
            piece(0, size)
        else:
            with tir.loop(full) as index:
                piece(index * size, size)
        if rest:
            piece(full * size, rest)

    def loops(self, runs: int, steps: int, body: Callable[[Expr, Expr], None]) -> None:
        """Emit ``body(run, step)`` for all steps of all runs."""
        if not self._span:
            with tir.loop(runs) as run, tir.loop(steps) as step:
                body(run, step)
            return
        if steps > self._span // 2:
            with tir.loop(runs) as run:
                self.loop(steps, lambda step: body(run, step))
            return
        # Several runs fit into 16 bits together.
        together = -(-runs // -(-runs // (self._span // steps)))

        def piece(first: Expr, count: int) -> None:
            with self.widened(False), tir.loop(count) as run, tir.loop(steps) as step:
                body(first + run, step)

        full, rest = divmod(runs, together)
        if full == 1:
            piece(0, together)
        else:
            with tir.loop(full) as index:
                piece(index * together, together)
        if rest:
            piece(full * together, rest)
