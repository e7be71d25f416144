"""Calibration inputs for a model without data: made from what its BatchNorms remember of the data it was trained on.

``noise``
    Standard normal values.
``fractal``
    Images whose spectrum falls as that of natural images does, 1/f in amplitude, each with its own contrast and colours.
``distilled``
    Fractal images, then moved by gradient descent until the mean and standard deviation of every channel in front of every
    BatchNorm are those that the BatchNorm has stored (Cai et al., "ZeroQ", arXiv 2001.00281, equation 3), here relative to
    the stored deviation, so that all layers weigh the same.

None of them is as good as a few dozen real inputs; docs/ptq.md has what each costs. Noise is worst where the closed form can fit
layers to it: MobileNetV2 at W8A8, 64 inputs, has a divergence of 0.51 from full precision, 0.047 with fractal images, 0.003 with real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cat_plugin.errors import CalibrationError, CATValueError
from cat_plugin.heap import freed_memory_kept
from cat_plugin.models import device_of, evaluating

__all__ = ["SOURCES", "has_statistics", "synthetic_inputs"]

#: How inputs can be made, from the cheapest to the best.
SOURCES = ("noise", "fractal", "distilled")

_BATCH = 32  # a BatchNorm's statistics are matched over so many inputs
_RATE = 0.1
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_Norm: TypeAlias = "nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d"


def synthetic_inputs(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 256,
    *,
    source: str | None = None,
    steps: int = 200,
    seed: int = 0,
) -> Tensor:
    """Make calibration inputs for a model.

    Parameters
    ----------
    model : nn.Module
        Takes (N, ...); its BatchNorms must not be folded yet. Left unchanged.
    shape : sequence of int
        Of one input, without the batch axis.
    count : int
        Inputs wanted.
    source : str or None
        One of :data:`SOURCES`; None is ``distilled`` for a model with BatchNorms, else ``fractal``, which is ``noise`` where inputs
        are not (C, height, width).
    steps : int
        Gradient steps of ``distilled`` for each 32 inputs.
    seed : int
        Equal seeds give equal inputs.

    Returns
    -------
    Tensor
        (count, ...) float32, on the model's device.

    Raises
    ------
    CATValueError
        If the shape, the count or the source cannot be used.
    CalibrationError
        If inputs are to be distilled from a model without BatchNorm statistics.
    """
    if not shape or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise CATValueError(
            f"input_shape is {shape!r}; expected the sizes of one input, such as (3, 224, 224)."
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CATValueError(f"count is {count!r}; expected an integer of at least 1.")
    if source is not None and source not in SOURCES:
        raise CATValueError(f"source is {source!r}; expected one of {', '.join(SOURCES)}.")
    norms = _norms(model)
    if source == "distilled" and not norms:
        raise CalibrationError(
            "the model has no BatchNorm with running statistics to distil inputs from; expected one that is not folded "
            "yet. Give calibration inputs, or take source='fractal'."
        )
    source = source or ("distilled" if norms else "fractal")
    generator = torch.Generator().manual_seed(seed)
    if source == "noise" or len(shape) != 3:
        inputs = torch.randn(count, *shape, generator=generator)
    else:
        inputs = _fractal(count, tuple(shape), generator)
    inputs = inputs.to(device_of(model) or "cpu")
    if source == "distilled":
        with freed_memory_kept():
            inputs = torch.cat([_distil(model, norms, part, steps) for part in inputs.split(_BATCH)])  # type: ignore[no-untyped-call]
    return inputs


def has_statistics(model: nn.Module) -> bool:
    """Whether the model has BatchNorms with running statistics, from which inputs can be distilled."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[_Norm]:
    return [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]


def _fractal(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(count, C, H, W) images with amplitudes that fall as 1/f, of mean 0 and deviation 1 over all of them."""
    channels, height, width = shape
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None, :]
    radius = (fy.square() + fx.square()).sqrt().clamp_min(1.0 / max(height, width))
    spectrum = torch.randn(count, channels, height, width // 2 + 1, 2, generator=generator)
    images = torch.fft.irfft2(torch.view_as_complex(spectrum) / radius, s=(height, width))
    grey = images.mean(1, keepdim=True)  # colours of natural images go together
    images = 0.7 * grey * math.sqrt(channels) + 0.3 * images
    images = images / images.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    made: Tensor = images * contrast + 0.5 * torch.randn(count, channels, 1, 1, generator=generator)
    return made


class _Statistics:
    """What stands in front of each BatchNorm, compared with what it remembers, while the model runs."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def __call__(self, norm: _Norm, inputs: tuple[Tensor, ...]) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        x = inputs[0]
        axes = [0, *range(2, x.ndim)]
        deviation = (norm.running_var + norm.eps).sqrt()
        mean = (x.mean(axes) - norm.running_mean) / deviation
        spread = (x.var(axes, unbiased=False) + norm.eps).sqrt() / deviation - 1.0
        self.loss = self.loss + mean.square().mean() + spread.square().mean()


@contextmanager
def _observed(norms: Sequence[_Norm]) -> Iterator[_Statistics]:
    statistics = _Statistics()
    hooks = [norm.register_forward_pre_hook(statistics) for norm in norms]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


def _distil(model: nn.Module, norms: Sequence[_Norm], start: Tensor, steps: int) -> Tensor:
    """Inputs whose statistics in front of every BatchNorm are those that are stored; the best of all steps."""
    inputs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([inputs], lr=_RATE)
    frozen = [p for p in model.parameters() if p.requires_grad]
    best, least = start, math.inf
    for p in frozen:
        p.requires_grad_(False)
    try:
        with evaluating(model), torch.enable_grad():
            for step in range(steps + 1):
                with _observed(norms) as statistics:
                    model(inputs)
                loss = float(statistics.loss.detach())
                if loss < least:
                    best, least = inputs.detach().clone(), loss
                if step == steps or not math.isfinite(loss):
                    break
                optimizer.param_groups[0]["lr"] = _RATE * 0.5 * (1.0 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                statistics.loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_()
    return best
