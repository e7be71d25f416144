"""The processes that quantize one model together, each of which holds and runs its own share of the calibration inputs.

Whatever is a sum over calibration inputs is summed over the processes, in float64; samples are drawn as one process would draw
them from all inputs; and what is chosen is the first process's choice, so that every process ends with the same bits.

Before every exchange the processes tell each other whether one of them has failed and that all are at the same place of the
code: an error on one of them ends all of them with its message, and none waits for another that will not come.
"""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from cat_plugin.errors import QuantizationError

__all__ = ["ALONE", "Extent", "Ranks", "share_of"]


def share_of(count: int, batch_size: int, rank: int, size: int) -> slice:
    """Which of `count` rows are a process's: whole batches, in the order of the ranks, as many for each as for any other.

    Parameters
    ----------
    count : int
        Rows in all.
    batch_size : int
        Rows in a batch.
    rank, size : int
        The process, and how many there are.

    Raises
    ------
    QuantizationError
        If there are fewer batches than processes.

    Examples
    --------
    >>> [share_of(100, 20, rank, 2) for rank in range(2)]
    [slice(0, 60, None), slice(60, 100, None)]
    """
    batches = -(-count // batch_size)
    if batches < size:
        raise QuantizationError(
            f"{count} calibration inputs in batches of {batch_size} are {batches}, too few for {size} processes; expected a "
            f"batch for each. Set batch_size to {max(count // size, 1)} or less, or start fewer processes."
        )
    whole, more = divmod(batches, size)
    ends = [(r * whole + min(r, more)) * batch_size for r in (rank, rank + 1)]
    return slice(ends[0], min(ends[1], count))


@dataclass(frozen=True)
class Extent:
    """Where a process's rows lie among those of all processes.

    Attributes
    ----------
    lengths : tuple of int
        Rows of every process.
    rank : int
        This one.
    """

    lengths: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return sum(self.lengths)

    @property
    def start(self) -> int:
        """Rows before this process's first."""
        return sum(self.lengths[: self.rank])

    def others(self, size: int) -> tuple[list[int], list[int]]:
        """Rows of each batch of at most `size` of the processes before this one, and of those behind it."""
        sizes = [[min(size, n - start) for start in range(0, n, size)] for n in self.lengths]
        before, behind = sizes[: self.rank], sizes[self.rank + 1 :]
        return [*itertools.chain(*before)], [*itertools.chain(*behind)]


class Ranks:
    """The processes of a group; of one alone every method leaves what it is given as it is.

    Parameters
    ----------
    rank, size : int
        This process, and how many there are; of the default group of ``torch.distributed`` if there are several.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._over = size == 1  # nothing is to be told any more
        self._device = torch.device("cpu")
        if size > 1 and "nccl" in str(dist.get_backend()):  # moves CUDA tensors only
            self._device = torch.device("cuda", torch.cuda.current_device())

    @classmethod
    def here(cls, distributed: bool = True) -> Ranks:
        """Those of the default group, where it was initialised."""
        if not distributed or not dist.is_available() or not dist.is_initialized():
            return ALONE
        size = dist.get_world_size()
        return cls(dist.get_rank(), size) if size > 1 else ALONE

    @property
    def first(self) -> bool:
        """Whether this process writes files and says what is done."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do: an error in one of them ends it in all.

        Raises
        ------
        QuantizationError
            With the other's message, where it was another process that failed.
        """
        try:
            yield
            self._meet("end")
        except Exception as error:
            if not self._over:
                with contextlib.suppress(QuantizationError):
                    self._exchange("", str(error) or type(error).__name__)
            raise

    def _meet(self, place: str) -> None:
        if self.size > 1:
            self._exchange(place, None)

    def _exchange(self, place: str, failure: str | None) -> None:
        """Tell the others that this process is here, or has failed, and hear of them."""
        tag = zlib.crc32(place.encode())
        words = [self.rank + 1, 0, -(1 << 40)] if failure is not None else [0, tag, -tag]
        with self._connected():
            state = torch.tensor(words, dtype=torch.int64, device=self._device)
            dist.all_reduce(state, op=dist.ReduceOp.MAX)
            failed, most, least = state.tolist()
            if failed:
                message = self._sent((failure or "").encode(), failed - 1).decode().rstrip(".")
        if failed:
            self._over = True
            raise QuantizationError(
                f"process {failed - 1} of {self.size} has failed: {message}. Nothing was quantized by any of them."
            )
        if most != -least:
            self._over = True
            raise QuantizationError(
                f"the {self.size} processes have gone different ways (this one is at {place!r}); expected the same model, "
                "specification and kind of processor in each. Quantize in one process (distributed=False)."
            )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._over = True
            raise QuantizationError(
                f"process {self.rank} of {self.size} has lost the others: {str(error).splitlines()[0]} Expected every process "
                "of the group to quantize, each with its share of the calibration inputs; distributed=False quantizes in one "
                "process alone."
            ) from error

    def _sent(self, text: bytes, source: int) -> bytes:
        """Bytes of one process, on all of them."""
        length = torch.tensor([len(text)], dtype=torch.int64, device=self._device)
        dist.broadcast(length, source)
        mine = text if self.rank == source else bytes(int(length))
        if not mine:
            return mine
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device)
        dist.broadcast(data, source)
        return data.cpu().numpy().tobytes()

    def told(self, text: bytes) -> bytes:
        """What the first process says."""
        self._meet("told")
        if self.size == 1:
            return text
        with self._connected():
            return self._sent(text, 0)

    def heard(self, text: bytes) -> list[bytes]:
        """What every process says, in the order of the ranks."""
        self._meet("heard")
        if self.size == 1:
            return [text]
        with self._connected():
            return [self._sent(text, source) for source in range(self.size)]

    def extent(self, rows: int) -> Extent:
        """Where this process's so many rows lie among all."""
        self._meet("extent")
        if self.size == 1:
            return Extent((rows,), 0)
        with self._connected():
            lengths = torch.zeros(self.size, dtype=torch.int64, device=self._device)
            lengths[self.rank] = rows
            dist.all_reduce(lengths)
        return Extent(tuple(lengths.tolist()), self.rank)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of some tensors by the sum over all processes."""
        self._meet(f"sum {[tuple(t.shape) for t in tensors]}")
        for tensor in tensors if self.size > 1 else ():
            with self._connected():
                moved = tensor.to(self._device).contiguous()
                dist.all_reduce(moved)
                if moved is not tensor:
                    tensor.copy_(moved)

    def gather(self, rows: Tensor) -> Tensor:
        """(N, ...) rows of all processes, (n, ...) of each, in the order of the ranks."""
        if self.size == 1:
            return rows
        if rows.dtype is torch.bool:
            return self.gather(rows.byte()).bool()
        extent = self.extent(len(rows))
        found = rows.new_zeros((extent.total, *rows.shape[1:]))
        found[extent.start : extent.start + len(rows)] = rows
        self.sum_([found])
        return found

    def picked(self, rows: Tensor, index: Tensor) -> Tensor:
        """(k, ...) rows at places (k,) among those of all processes, (n, ...) of each."""
        if self.size == 1:
            return rows[index.to(rows.device)]
        start = self.extent(len(rows)).start
        here = (index >= start) & (index < start + len(rows))
        found = rows.new_zeros((len(index), *rows.shape[1:]))
        found[here.to(rows.device)] = rows[(index[here] - start).to(rows.device)]
        self.sum_([found])
        return found

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's value of a tensor."""
        self._meet(f"same {tuple(tensor.shape)} {tensor.dtype}")
        if self.size == 1:
            return tensor
        with self._connected():
            moved = tensor.detach().to(self._device).contiguous().clone()
            dist.broadcast(moved, 0)
        return moved.to(tensor.device)


ALONE = Ranks()
"""One process that holds all inputs."""
