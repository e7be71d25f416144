"""How a kernel's work is shared among threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.epilogue import chunks
from tvm_backend.kernels.tir import Expr

__all__ = ["TASK_ELEMENTS", "Tasks", "flat", "run"]

TASK_ELEMENTS = 16384
"""Elements worth handing to a thread, where little is computed for each."""


def run(extent: Expr, task: Callable[[Expr], None], alone: Expr | None = None) -> None:
    """Run ``task(0) .. task(extent - 1)``, by several threads if that is worth it.

    Waking threads costs a microsecond or two, which is what a small layer takes at batch 1; so where the amount of
    work is known at run time only, the function holds both ways.

    Parameters
    ----------
    extent : Expr
        How many tasks.
    task : callable
        Emits a task, given its number.
    alone : Expr, optional
        Whether one thread does it all; if there is only one task, by default.
    """
    alone = extent == 1 if alone is None else alone

    def shared() -> None:
        with tir.parallel(extent) as index:
            task(index)

    def serial() -> None:
        with tir.loop(extent) as index:
            task(index)

    tir.branch(alone, serial, shared)


@dataclass(frozen=True)
class Tasks:
    """The same number of units of work for each image, put together to tasks.

    Parameters
    ----------
    batch : Expr
        Number of images.
    units : int
        Units of an image, rows for instance.
    cost : int
        What a unit costs, in whatever measure.
    worthwhile : int
        The cost of a task that is worth handing to a thread.
    most : int, optional
        Most units of a task.
    enough : int, optional
        Tasks of an image that are enough, where smaller ones cost more.
    """

    batch: Expr
    units: int
    cost: int
    worthwhile: int
    most: int | None = None
    enough: int | None = None

    @property
    def per_image(self) -> int:
        """Tasks of an image: a multiple of four or two where there are as many, so that threads get equal shares."""
        count = max(1, min(self.units, self.units * self.cost // self.worthwhile))
        if self.enough is not None:
            count = min(count, self.enough)
        if self.most is not None:
            count = max(count, -(-self.units // max(1, self.most)))
        for even in (4, 2):
            if count >= even and -(-count // even) * even <= self.units:
                return -(-count // even) * even
        return count

    @property
    def chunk(self) -> int:
        """Most units of a task within an image."""
        return -(-self.units // self.per_image)

    @property
    def images(self) -> int:
        """Images of a task, where one image is not worth it."""
        return 1 if self.per_image > 1 else max(1, self.worthwhile // (self.units * self.cost))

    def part(self, index: Expr) -> tuple[Expr, Expr]:
        """First unit and number of units of one of the :attr:`per_image` tasks; these differ by one unit at most."""
        if self.units % self.per_image == 0:
            return index * self.chunk, self.chunk
        first = index * self.units // self.per_image
        return first, (index + 1) * self.units // self.per_image - first

    def run(self, body: Callable[[Expr, Expr, Expr], None]) -> None:
        """Emit the loops around ``body(image, first unit, number of units)``."""
        images = self.images if not isinstance(self.batch, int) else min(self.images, self.batch)

        def task(index: Expr) -> None:
            if self.per_image > 1:
                body(index // self.per_image, *self.part(index % self.per_image))
                return
            start = index * images
            with tir.loop(tir.least(images, self.batch - start)) as image:
                body(start + image, 0, self.units)

        run((self.batch + (images - 1)) // images * self.per_image, task)


def flat(batch: Expr, size: int, lanes: int, body: Callable[[Expr, Expr, int], None]) -> None:
    """Emit the loops around ``body(image, start, lanes)`` over the `size` consecutive elements of each image."""
    units, rest = divmod(size, lanes)

    def task(image: Expr, first: Expr, count: Expr) -> None:
        with tir.loop(count) as unit:
            body(image, (first + unit) * lanes, lanes)
        if rest:
            with tir.when(first + count == units):
                tail(image)

    def tail(image: Expr) -> None:
        for begin, width in chunks(rest, lanes):
            body(image, units * lanes + begin, width)

    if units:
        Tasks(batch, units, lanes, TASK_ELEMENTS).run(task)
    else:
        with tir.loop(batch) as image:
            tail(image)
