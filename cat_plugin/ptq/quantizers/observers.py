"""Initial ranges by search for the least mean squared error.

The clipping range that minimises the error of rounding is found by trying a grid of ranges (Nagel et al., "A White
Paper on Neural Network Quantization", arXiv 2106.08295, section 2.2, equation 2.5); at 2 to 4 bits it is far inside
the least and the greatest value.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_plugin.ptq.quantizers.logarithmic import LogQuantizer, search_levels
from cat_plugin.ptq.quantizers.per_token import TokenQuantizer
from cat_plugin.ptq.quantizers.tables import FittedQuantizer, fit_levels
from cat_plugin.ptq.quantizers.uniform import ActQuantizer, integer_range
from cat_plugin.ptq.ranks import ALONE, Ranks

__all__ = [
    "calibrate",
    "search_activation_range",
    "search_channel_ranges",
    "search_token_share",
    "search_weight_range",
    "subsample",
]

_TINY = 1e-8
_LEAST = 1e-30  # magnitude that has a grid
_SAME = 1e-7  # share of a number that float32 does not tell from nothing
_SAMPLE = 1 << 17  # values that a range is searched on
_TOKENS = 2048
_CACHED = 1 << 15  # weights whose grids are searched at a time


def calibrate(
    quantizer: ActQuantizer,
    value: Tensor,
    symmetric: bool,
    generator: torch.Generator,
    weights: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Choose the grid of a quantizer from an activation (N, ...), in place.

    Parameters
    ----------
    quantizer : ActQuantizer
        Of any kind.
    value : Tensor
        (N, ...) activation.
    symmetric : bool
        Zero point 0 for signed data on a uniform grid of the whole tensor.
    generator : torch.Generator
        CPU generator of what is sampled.
    weights : Tensor or None
        (N, positions) how much the positions of (N, positions..., C) count: as often they are drawn.
    ranks : Ranks
        The processes from all of whose values is drawn.
    """
    if isinstance(quantizer, FittedQuantizer):
        sample, start = _weighted_sample(value, weights, generator, ranks), LogQuantizer(quantizer.bits)
        start.set_range(*search_levels(sample, quantizer.bits))
        quantizer.set_levels(ranks.same(fit_levels(sample, start.levels).to(sample.device)))
        return
    if isinstance(quantizer, TokenQuantizer):
        tokens = value.reshape(-1, value.shape[-1])
        some = torch.randperm(ranks.extent(len(tokens)).total, generator=generator)[:_TOKENS]
        scale, zero_point, signed = search_token_share(ranks.picked(tokens, some), quantizer), 0, False
    else:
        sample = _weighted_sample(value, weights, generator, ranks)
        if isinstance(quantizer, LogQuantizer):
            scale, zero_point, signed = search_levels(sample, quantizer.bits)
        else:
            scale, zero_point, signed = search_activation_range(sample, quantizer.bits, symmetric)
    grid = ranks.same(torch.tensor([scale, zero_point, signed], dtype=torch.float64)).tolist()
    quantizer.set_range(grid[0], int(grid[1]), bool(grid[2]))


def _weighted_sample(
    value: Tensor, weights: Tensor | None, generator: torch.Generator, ranks: Ranks
) -> Tensor:
    if weights is None or value.shape[:-1].numel() != weights.numel():
        return subsample(value, _SAMPLE, generator, ranks)
    rows = max(1, _SAMPLE // value.shape[-1])
    chosen = torch.multinomial(ranks.gather(weights.flatten()).cpu(), rows, True, generator=generator)
    return ranks.picked(value.reshape(-1, value.shape[-1]), chosen).flatten()


def search_token_share(tokens: Tensor, quantizer: TokenQuantizer) -> float:
    """Share of its own range that each of (n, C) tokens is rounded with least squared error at.

    Errors are over the token's power, so that tokens with outliers do not outvote all others.
    """
    power = tokens.square().sum(1).clamp(min=_TINY)
    best = (float("inf"), 1.0)
    for share in torch.linspace(1.0, 0.5 if quantizer.bits < 6 else 0.8, 26).tolist():
        error = float(((quantizer.rounded(tokens, share) - tokens).square().sum(1) / power).mean())
        if error < best[0]:
            best = (error, share)
    return best[1]


def subsample(x: Tensor, count: int, generator: torch.Generator, ranks: Ranks = ALONE) -> Tensor:
    """At most ``count`` values of ``x`` (flattened) on all processes, drawn without bias along any axis."""
    flat = x.reshape(-1)
    total = ranks.extent(flat.numel()).total
    if total <= count:
        return ranks.gather(flat)
    return ranks.picked(flat, torch.randint(total, (count,), generator=generator))


def search_activation_range(values: Tensor, bits: int, symmetric: bool) -> tuple[float, int, bool]:
    """Scale, zero point and signedness of least squared error for a sample of an activation.

    Parameters
    ----------
    values : Tensor
        (n,) float sample.
    bits : int
        2..8.
    symmetric : bool
        Zero point 0 for signed data.

    Returns
    -------
    scale : float
        Positive.
    zero_point : int
        Inside the integer range; 0 for data without negative values.
    signed : bool
        Whether the integers are signed.
    """
    low, high = float(values.min()), float(values.max())
    signed = low < 0
    qmin, qmax = integer_range(bits, signed)
    magnitude = max(abs(low), abs(high))
    if (
        magnitude <= _LEAST or high - low <= _SAME * magnitude
    ):  # a constant: zero and that value are on the grid
        return (magnitude / (qmax if high > 0 else -qmin) if magnitude > _LEAST else 1.0), 0, signed
    fractions = torch.linspace(0.05 if bits < 6 else 0.3, 1.0, 60 if bits < 6 else 36).tolist()
    candidates: set[tuple[float, int]] = set()
    if not signed:
        candidates = {(f * high / qmax, 0) for f in fractions}
    elif symmetric:
        candidates = {(f * max(high / qmax, low / qmin), 0) for f in fractions}
    else:
        coarse = [*fractions[::3], 1.0]
        for f_low in coarse:
            for f_high in coarse:
                a, b = min(f_low * low, 0.0), max(f_high * high, 0.0)
                scale = (b - a) / (qmax - qmin)
                candidates.add((scale, max(qmin, min(qmax, round(qmin - a / scale)))))
    tried = sorted(candidates)
    scales, zeros = torch.tensor(tried, dtype=torch.float64, device=values.device).T.unsqueeze(1).unbind()
    best = int(_errors_between_levels(values.double().reshape(1, -1), scales, zeros, qmin, qmax).argmin())
    return tried[best][0], tried[best][1], signed


def search_channel_ranges(values: Tensor, bits: int) -> Tensor:
    """Range of least squared error of each channel on a grid of its own.

    Parameters
    ----------
    values : Tensor
        (n, C) float sample.
    bits : int
        2..8.

    Returns
    -------
    Tensor
        (2, C) ends, shares of the distances from the mean to the extremes.
    """
    steps = 2**bits - 1
    mean = values.mean(0)
    below, above = values.amin(0) - mean, values.amax(0) - mean
    share = torch.ones(2, values.shape[1], device=values.device)
    best = torch.full((values.shape[1],), torch.inf, device=values.device)
    centred = values - mean

    def consider(trial: Tensor) -> None:
        nonlocal best, share
        low, high = trial[0] * below, trial[1] * above
        scale = ((high - low) / steps).clamp(min=_TINY)
        rounded = ((centred - low) / scale).round_().clamp_(0, steps).mul_(scale).add_(low)
        error = rounded.sub_(centred).square_().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, trial, share)

    coarse = (1.0, 0.8, 0.64, 0.5, 0.36, 0.24, 0.14, 0.07)
    for pair in itertools.product(coarse, repeat=2):
        consider(torch.tensor(pair, device=values.device).unsqueeze(1).expand_as(share))
    for end in (0, 1):
        start = share.clone()
        for factor in (0.85, 0.92, 1.08, 1.17):
            trial = share.clone()
            trial[end] = (start[end] * factor).clamp(max=1.0)
            consider(trial)
    return torch.stack([mean + share[0] * below, mean + share[1] * above])


def search_weight_range(
    weight: Tensor, bits: int, symmetric: bool, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least squared rounding error, for each channel or each group of its inputs.

    Parameters
    ----------
    weight : Tensor
        (O, ...) float, output channels first.
    bits : int
        2..8, stored as signed integers.
    symmetric : bool
        Zero points are 0; otherwise they are searched together with the scale.
    group : int or None
        Inputs that share a scale, of an (O, I) weight; None is all.

    Returns
    -------
    scale : Tensor
        (O,) float32, positive; (O, I / group) with groups.
    zero_point : Tensor
        Of the same shape, int64 inside the integer range.
    """
    if group is not None:
        scale, zero_point = search_weight_range(weight.reshape(-1, group), bits, symmetric)
        return scale.reshape(len(weight), -1), zero_point.reshape(len(weight), -1)
    flat = weight.detach().reshape(len(weight), -1)
    # On a processor as many channels at a time as its cache holds: they are read a hundred times.
    rows = len(flat) if flat.is_cuda else max(1, _CACHED // max(flat.shape[1], 1))
    found = [_search_rows(some.double(), bits, symmetric) for some in torch.split(flat, rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_rows(flat: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """:func:`search_weight_range` of (O, K) float64 rows."""
    qmin, qmax = integer_range(bits, True)
    low, high = flat.amin(1).clamp(max=0.0), flat.amax(1).clamp(min=0.0)
    # 2-bit symmetric weights have the levels -2..1: the sign of the grid cannot be turned, the scale decides
    reach = torch.maximum(high, -low).clamp(min=_TINY)
    fractions = (torch.linspace(0.2, 1.05, 60) if bits < 6 else torch.linspace(0.6, 1.02, 43)).tolist()
    if symmetric:
        scales = torch.stack([f * reach / (-qmin - 0.5) for f in fractions], 1)
        zeros = torch.zeros_like(scales)
    else:
        span = (high - low).clamp(min=_TINY)
        scales = torch.stack([f * span / (qmax - qmin) for f in fractions], 1)
        lows = low.unsqueeze(1) * torch.tensor(fractions, dtype=flat.dtype, device=flat.device)
        centre = (qmin - lows / scales).round().clamp(qmin, qmax)
        zeros = torch.stack([(centre + d).clamp(qmin, qmax) for d in (-1, 0, 1)], 2).flatten(1)
        scales = scales.repeat_interleave(3, 1)
    few = bits <= 4 and not symmetric and flat.shape[1] >= 16 << bits  # levels, so that sorting pays
    errors = _errors_between_levels if few else _errors_of_grids
    best = errors(flat, scales, zeros, qmin, qmax).argmin(1, keepdim=True)
    scale, zero = scales.gather(1, best).squeeze(1), zeros.gather(1, best).squeeze(1)
    return scale.float().clamp(min=_TINY), zero.long()


def _errors_of_grids(flat: Tensor, scales: Tensor, zeros: Tensor, qmin: int, qmax: int) -> Tensor:
    """(O, T) squared error of (O, K) rows, each rounded to T grids."""
    errors = []
    for scale, zero in zip(scales.unbind(1), zeros.unbind(1), strict=True):
        s, z = scale.unsqueeze(1), zero.unsqueeze(1)
        rounded = (flat / s).round_().add_(z).clamp_(qmin, qmax).sub_(z).mul_(s)
        errors.append(rounded.sub_(flat).square_().sum(1))
    return torch.stack(errors, 1)


def _errors_between_levels(flat: Tensor, scales: Tensor, zeros: Tensor, qmin: int, qmax: int) -> Tensor:
    """:func:`_errors_of_grids` from sums over the sorted row between where the grids' few levels meet."""
    ordered = flat.sort(1).values
    sums = F.pad(ordered.cumsum(1), (1, 0))
    levels = torch.arange(qmin, qmax + 1, dtype=flat.dtype, device=flat.device)
    levels = (levels - zeros.unsqueeze(2)) * scales.unsqueeze(2)  # (O, T, L)
    meet = (levels[..., 1:] + levels[..., :-1]) / 2
    ends = torch.searchsorted(ordered, meet.flatten(1)).reshape(meet.shape)
    ends = F.pad(F.pad(ends, (1, 0)), (0, 1), value=flat.shape[1])
    below = sums.gather(1, ends.flatten(1)).reshape(ends.shape)
    # sum over x of (x - v)^2, v the level of x
    power = flat.square().sum(1).unsqueeze(1)
    return power + (ends.diff() * levels.square() - 2.0 * below.diff() * levels).sum(2)
