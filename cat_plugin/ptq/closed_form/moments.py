"""Second moments of a layer's input and output: all that closed-form fitting needs of the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.ptq.closed_form.grid_products import Grid, Windows, byte_products, from_bytes_
from cat_plugin.ptq.graph.modules import QuantOp
from cat_plugin.ptq.ranks import ALONE, Ranks

__all__ = ["PATCHES", "ROWS", "Moments", "input_patches", "measure", "pass_over"]


ROWS = 1 << 16
"""Output positions that a layer is fitted to at most."""

PATCHES = 1 << 22
"""Values of input patches that are held at a time."""

_BYTES = 1 << 24  # of input patches, where they are bytes
_PADDED = 1 << 21  # values of a layer's input that are padded at a time


@dataclass
class Moments:
    """Centred second moments, one set for each group of a convolution.

    Attributes
    ----------
    h : Tensor
        (G, K, K) covariance of the input patches, float64.
    c : Tensor
        (G, K, O/G) covariance of input patches and target outputs, float64.
    mean_x : Tensor
        (G, K) mean patch.
    mean_y : Tensor
        (G, O/G) mean target.
    halves : tuple of Moments
        The same over every other batch and over the rest, to judge on one what was fitted to the other; empty if there
        was one batch only.
    """

    h: Tensor
    c: Tensor
    mean_x: Tensor
    mean_y: Tensor
    halves: tuple[Moments, ...] = ()


def _padding(layer: QuantOp, kernel: list[int]) -> list[int]:
    """Arguments of ``F.pad`` for the layer's padding, last axis first."""
    stride, padding, dilation = _convolution_arguments(layer, len(kernel))
    del stride
    out: list[int] = []
    for axis in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            out += [total // 2, total - total // 2]
        elif padding == "valid":
            out += [0, 0]
        else:
            out += [int(padding[axis])] * 2
    return out


def _convolution_arguments(layer: QuantOp, axes: int) -> tuple[list[int], Any, list[int]]:
    extra = layer.extra

    def wide(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * axes if len(values) == 1 else values

    stride = wide(extra[0]) if len(extra) > 0 else [1] * axes
    padding = extra[1] if len(extra) > 1 else 0
    if not isinstance(padding, str):
        padding = wide(padding)
    dilation = wide(extra[2]) if len(extra) > 2 else [1] * axes
    return stride, padding, dilation


def _windows_of(layer: QuantOp) -> Windows:
    """What a convolution reads; one of one axis, of images a row high."""
    kernel = list(layer.weight.shape[2:])
    stride, _, dilation = _convolution_arguments(layer, len(kernel))
    padding = _padding(layer, kernel)
    if len(kernel) == 1:
        kernel, stride, dilation = [1, *kernel], [1, *stride], [1, *dilation]
    return Windows(kernel, stride, dilation, padding)


def _picked(values: Tensor, positions: Tensor | None) -> Tensor:
    """Some of the output positions, the last axis."""
    return values if positions is None else values.index_select(-1, positions)


def _windows(
    x: Tensor, kernel: list[int], dilation: list[int], stride: list[int], positions: Tensor
) -> Tensor:
    """What ``F.unfold`` gives at some output positions only: (N, I*k, positions) of a padded (N, I, H, W)."""
    width = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    top = positions.div(width, rounding_mode="floor") * stride[0]
    left = positions.remainder(width) * stride[1]
    shift_y = torch.arange(kernel[0], device=x.device).mul(dilation[0]).repeat_interleave(kernel[1])
    shift_x = torch.arange(kernel[1], device=x.device).mul(dilation[1]).repeat(kernel[0])
    places = (top + shift_y.unsqueeze(1)) * x.shape[3] + left + shift_x.unsqueeze(1)  # (k, positions)
    picked = x.flatten(2).index_select(2, places.flatten())
    return picked.reshape(len(x), -1, len(positions))


def input_patches(layer: QuantOp, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """What each output value is a linear function of.

    Parameters
    ----------
    layer : QuantOp
        The layer.
    x : Tensor
        Its input, (N, I, ...) of a convolution or (..., I) of a linear layer.
    positions : Tensor or None
        Flat output positions of a convolution to keep; None keeps all.

    Returns
    -------
    Tensor
        (G, P, K): for each group and output position the K inputs it reads, in the order of the weight's axes.
    """
    if layer.kind == "linear":
        return x.reshape(1, -1, x.shape[-1])
    rows = max(1, _PADDED // max(x[0].numel(), 1))
    if positions is not None and len(x) > rows:  # padded all at once, they would be copied whole
        return torch.cat([input_patches(layer, some, positions) for some in torch.split(x, rows)], 1)
    windows = _windows_of(layer)
    x = windows.padded(x.unsqueeze(2) if x.ndim == 3 else x)
    kernel, dilation, stride = windows.kernel, windows.dilation, windows.stride
    if positions is None:
        columns = F.unfold(x, tuple(kernel), dilation=tuple(dilation), stride=tuple(stride))  # (N, I*k, L)
    else:
        columns = _windows(x, kernel, dilation, stride, positions)
    groups = layer.groups
    n, width, count = columns.shape
    return columns.reshape(n, groups, width // groups, count).permute(1, 0, 3, 2).flatten(1, 2)


def _output_rows(layer: QuantOp, y: Tensor, positions: Tensor | None) -> Tensor:
    """(G, P, O/G) view of the layer's output, rows as :func:`input_patches` orders them."""
    if layer.kind == "linear":
        return y.reshape(1, -1, y.shape[-1])
    groups = layer.groups
    flat = _picked(y.flatten(2), positions)
    return flat.reshape(len(y), groups, -1, flat.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def _sums(
    layer: QuantOp, x: Tensor, y: Tensor, positions: Tensor | None, weights: Tensor | None
) -> tuple[list[Tensor], float]:
    """What is added up over some rows, float64: products of patches and of patches with outputs, both sums; and how many."""
    patches, target = input_patches(layer, x, positions), _output_rows(layer, y, positions)
    weighted, wanted, counted = patches, target, float(patches.shape[1])
    if weights is not None:
        each = weights.reshape(1, -1, 1).to(patches)
        weighted, wanted, counted = patches * each, target * each, float(each.sum())
    transposed = weighted.transpose(1, 2)
    parts = [torch.bmm(transposed, patches), torch.bmm(transposed, target), weighted.sum(1), wanted.sum(1)]
    return [part.double() for part in parts], counted


def _sums_on_grid(
    layer: QuantOp, x: Tensor, y: Tensor, positions: Tensor | None, grid: Grid
) -> tuple[list[Tensor], float]:
    """:func:`_sums` of a layer of one group; those of inputs alone are sums over bytes, whole numbers of any type."""
    integers = grid.bytes_of(x)
    if layer.kind == "linear":
        target = y.reshape(-1, y.shape[-1])
        columns = integers.reshape(-1, x.shape[-1]).T
        across = x.reshape(-1, x.shape[-1]).T @ target
    else:
        windows = _windows_of(layer)
        if x.ndim == 3:
            x, y, integers = x.unsqueeze(2), y.unsqueeze(2), integers.unsqueeze(2)
        integers = windows.padded(integers, -grid.offset)
        target = _picked(y.flatten(2), positions).transpose(0, 1).flatten(1).T
        if positions is None:
            columns = windows.columns(integers)
            across = windows.weight_gradient(windows.padded(x), y)
        else:
            picked = _windows(integers, windows.kernel, windows.dilation, windows.stride, positions)
            columns = picked.transpose(0, 1).flatten(1)
            across = columns.float().add_(grid.offset).mul_(grid.scale) @ target
    second, first = byte_products(columns)
    parts = [second, across.double(), first, target.sum(0).double()]
    return [part.unsqueeze(0) for part in parts], float(columns.shape[1])


@torch.no_grad()
def measure(
    layer: QuantOp,
    x: Tensor,
    y: Tensor | Callable[[slice], Tensor],
    max_rows: int,
    batch_size: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    ranks: Ranks = ALONE,
    grid: Grid | None = None,
) -> Moments:
    """Moments of the layer's inputs and target outputs over the calibration set.

    Parameters
    ----------
    layer : QuantOp
        The layer.
    x : Tensor
        (N, ...) its (quantized) inputs.
    y : Tensor or callable
        (N, ...) the outputs it should give, or what gives them for some rows.
    max_rows : int
        Output positions used at most; drawn at random for each batch when a convolution has more.
    batch_size : int
        Images unfolded at once.
    generator : torch.Generator
        Draws the positions.
    weights : Tensor or None
        (N, positions) how much each position of a linear layer's output counts; None counts all alike.
    ranks : Ranks
        The processes whose inputs are added up.
    grid : Grid or None
        On which the inputs lie: their products are then exact, and cheaper on a processor.

    Returns
    -------
    Moments
        Over all rows used, and over the two halves of the batches.
    """
    device = layer.weight.device
    sums: list[Tensor] | None = None
    odd: list[Tensor] | None = None
    rows_seen = rows_odd = 0.0

    def outputs_of(rows: slice) -> Tensor:
        return (y(rows) if callable(y) else y[rows]).to(device)

    whole = grid if weights is None and layer.groups == 1 and device.type == "cpu" else None
    convolution = layer.kind != "linear"
    count = outputs_of(slice(0, 1))[0, 0].numel() if convolution else 1
    extent = ranks.extent(len(x))
    before, behind = (len(sizes) for sizes in extent.others(batch_size))
    share = min(1.0, max_rows / max(extent.total * count, 1))
    drawn = convolution and share < 1.0
    pass_over(generator, count, before if drawn else 0)
    for number, start in enumerate(range(0, len(x), batch_size), before):
        end = min(start + batch_size, len(x))
        positions, step = None, batch_size
        if convolution:
            if drawn:
                kept = max(1, round(share * count))
                positions = torch.randperm(count, generator=generator)[:kept].to(device)
            read = layer.groups * layer.weight[0].numel() * (count if positions is None else len(positions))
            step = max(1, (PATCHES if whole is None else _BYTES) // read)
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            # values beyond the memory budget are on the processor, whatever computes
            given, wanted = x[rows].to(device), outputs_of(rows)
            each = None if weights is None else weights[rows]
            if whole is None:
                parts, counted = _sums(layer, given, wanted, positions, each)
            else:
                parts, counted = _sums_on_grid(layer, given, wanted, positions, whole)
            if number % 2:
                odd = _copied(parts) if odd is None else _added(odd, parts)
                rows_odd += counted
            sums = _copied(parts) if sums is None else _added(sums, parts)
            rows_seen += counted
    assert sums is not None
    pass_over(generator, count, behind if drawn else 0)
    if ranks.size > 1:
        rest = [torch.zeros_like(part) for part in sums] if odd is None else odd
        counts = torch.tensor([rows_seen, rows_odd], dtype=torch.float64)
        ranks.sum_([*sums, *rest, counts])
        rows_seen, rows_odd = counts.tolist()
        odd = rest if rows_odd else None
    if whole is not None:
        from_bytes_(sums[0], sums[2], rows_seen, whole)
        if odd is not None:
            from_bytes_(odd[0], odd[2], rows_odd, whole)
    halves: tuple[Moments, ...] = ()
    if odd is not None:
        even = [a - b for a, b in zip(sums, odd, strict=True)]
        halves = (_centred_(even, rows_seen - rows_odd), _centred_(odd, rows_odd))
    moments = _centred_(sums, rows_seen)
    moments.halves = halves
    return moments


def pass_over(generator: torch.Generator, count: int, batches: int) -> None:
    """Draw what other processes draw for their batches."""
    for _ in range(batches):
        torch.randperm(count, generator=generator)


def _copied(parts: list[Tensor]) -> list[Tensor]:
    """float64 copies."""
    return [part.to(torch.float64, copy=True) for part in parts]


def _added(sums: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """The sums, with the parts added in place."""
    return [total.add_(part) for total, part in zip(sums, parts, strict=True)]


def _centred_(sums: list[Tensor], rows: float) -> Moments:
    """Moments of sums, which are changed in place: they are large."""
    h, c, mean_x, mean_y = (value.div_(rows) for value in sums)
    diagonal = h.diagonal(dim1=1, dim2=2)
    # the products may be summed in float32: what is left of an input that hardly varies is rounding error
    power = diagonal.mean(1, keepdim=True)
    h.baddbmm_(mean_x.unsqueeze(2), mean_x.unsqueeze(1), alpha=-1)
    diagonal += 1e-6 * power + 1e-12
    c.baddbmm_(mean_x.unsqueeze(2), mean_y.unsqueeze(1), alpha=-1)
    return Moments(h, c, mean_x, mean_y)
