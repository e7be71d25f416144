"""What a compilation did: kernels, operators left in float, sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CompileReport", "KernelEntry"]


@dataclass(frozen=True)
class KernelEntry:
    """One kernel call of the compiled model, in order of execution.

    Parameters
    ----------
    name : str
        The function's name in the library.
    kind : str
        The specification's class, or ``cluster_affine`` and its like.
    output : tuple of int
        Shape of the output without the batch.
    variant : str
        Instruction set and algorithm.
    weight_bits : int
        Bits of a weight; 0 when there are none.
    weight_bytes : int
        Size of the packed weight.
    operations : int
        Multiplications and additions for one sample; for kernels without a weight, elements moved.
    bytes : int
        Bytes of inputs and outputs for one sample, plus the packed weight once.
    unpacking : str
        Where weights below 8 bits become bytes: ``"in registers"``, ``"once a call"`` into memory that the call takes for it,
        ``"in registers, or by block"`` where many rows take AMX tiles, or empty where they are stored as bytes.
    tile_state : bool
        Whether it uses registers that Linux grants to a process only when it asks (AMX).
    remark : str
        Why it is slower than it could be: ``"in words: neighbouring weights exceed 128 (see bounded_sums)"`` where 8-bit weights are widened to 16
        bits on processors without VNNI, which weights of 7 bits, or rounded with ``bounded_sums``, would not be.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    variant: str = ""
    weight_bits: int = 0
    weight_bytes: int = 0
    operations: int = 0
    bytes: int = 0
    unpacking: str = ""
    tile_state: bool = False
    remark: str = ""


@dataclass(frozen=True)
class CompileReport:
    """What :func:`tvm_backend.compile` made.

    Parameters
    ----------
    path : pathlib.Path
        The library; ``model.json`` lies beside it.
    target : str
        What was asked for.
    variants : tuple of dict
        For each variant its file, target and the processor features that it needs.
    kernels : tuple of KernelEntry
        The integer kernels and the correction of the first variant.
    float_ops : tuple of str
        Operators that run in float32, by name; empty when the whole model is integers.
    batch_sizes : tuple of int
        Batch sizes with code of their own, besides the general code.
    seconds : float
        Time taken; near zero for a result out of the cache.
    cached : bool
        Whether it came out of the cache.
    """

    path: Path
    target: str
    variants: tuple[dict[str, Any], ...]
    kernels: tuple[KernelEntry, ...]
    float_ops: tuple[str, ...]
    batch_sizes: tuple[int, ...] = ()
    seconds: float = 0.0
    cached: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    @property
    def operations(self) -> int:
        """Integer multiplications and additions of all layers with weights, for one sample."""
        return sum(kernel.operations for kernel in self.kernels if kernel.weight_bits)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        result = asdict(self)
        result["path"] = str(self.path)
        return result

    def __str__(self) -> str:
        lines = [f"{self.path}: target {self.target}, {len(self.kernels)} kernels, {self.seconds:.1f} s"]
        for kernel in self.kernels:
            bits = f", {kernel.weight_bits}-bit weights" if kernel.weight_bits else ""
            bits += f" unpacked {kernel.unpacking}" if kernel.unpacking else ""
            bits += f" {kernel.remark}" if kernel.remark else ""
            lines.append(f"  {kernel.name}: {kernel.kind} -> {'x'.join(map(str, kernel.output))}{bits}")
        names = ", ".join(sorted(set(self.float_ops))) or "none"
        lines.append(f"  operators in float32: {names}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
