"""Which layers deserve more bits: a ladder of configurations, from low bits everywhere to 8 bits in all layers.

Trials climb it until one meets the criterion, as accuracy control in NNCF does; each rung gives 8 bits to those layers that do
the most damage for the bytes that this costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cat_plugin.recipe import options

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.batches import ModelCall
    from cat_plugin.ptq.sensitivity_analysis import Sensitivity

__all__ = ["SHARES", "ladder", "rungs"]

SHARES = (0.0, 0.5, 0.75, 0.9, 0.97, 1.0)
"""What share of the damage, as rounding each layer alone does it, the rungs take away."""

_BITS = 8


def rungs(layers: Sequence[Sensitivity]) -> list[list[str]]:
    """Return for each share of the damage the layers that are given 8 bits.

    Parameters
    ----------
    layers : sequence of Sensitivity
        Of layers, not of blocks.

    Returns
    -------
    list of list of str
        Names of layers, each list holding the one before; the last names all that have fewer than 8 bits.
    """
    low = [layer for layer in layers if min(layer.w_bits, layer.a_bits) < _BITS]

    def worth(layer: Sensitivity) -> float:
        # A layer whose inputs alone are low costs no bytes: it comes first.
        added = layer.weights * (_BITS - layer.w_bits) / 8
        return layer.divergence / max(added, 1.0)

    total = sum(layer.divergence for layer in low)
    found: list[list[str]] = []
    chosen: list[str] = []
    taken = 0.0
    waiting = sorted(low, key=worth, reverse=True)
    for share in SHARES:
        while waiting and (share == 1.0 or taken < share * total):
            layer = waiting.pop(0)
            chosen.append(layer.name)
            taken += layer.divergence
        if not found or len(chosen) > len(found[-1]):
            found.append(list(chosen))
    return found


def ladder(params: dict[str, Any], model: nn.Module, calls: list[ModelCall]) -> list[dict[str, Any]]:
    """Return the configurations to try, the smallest model first.

    Parameters
    ----------
    params : dict
        One configuration of the plugin's own engine, without lists; its bits are those of the first rung.
    model : torch.nn.Module
        The full-precision model; left unchanged.
    calls : list of ModelCall
        The calibration data, of which some rows measure each layer's damage.
    """
    from cat_plugin.ptq.sensitivity_analysis import sensitivity

    layers = sensitivity(model, options.make_spec(params), calls, blocks=False)
    own = dict(params.get("overrides") or {})
    made = []
    for names in rungs(layers):
        raised = {name: {"w_bits": _BITS, "a_bits": _BITS} for name in names}
        # Behind the raised layers: what the recipe itself says of a layer holds.
        made.append({**params, "overrides": {**raised, **own}} if raised or own else dict(params))
    return made
