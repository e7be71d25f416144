"""What ``fast``, ``balanced`` and ``best`` mean: how much work each stage does.

``fast`` takes no gradient step through the network: searched ranges, least squares, error-compensated rounding, bias
correction.  ``balanced`` trains each unit and refines the grids; ``best`` trains the whole model on its logits in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat_plugin.ptq.spec import QuantSpec

__all__ = ["PRESETS", "TRAINED", "Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, resolved from a specification.

    Attributes
    ----------
    unit_steps, model_steps, refinement_steps : int
        Gradient steps for each unit, of the whole-model stage and of the refinement; 0 leaves a stage out.
    smoothing_epochs : int
        Passes over the calibration inputs for each block in which scales and shifts of channels are trained.
    """

    unit_steps: int
    model_steps: int
    refinement_steps: int
    smoothing_epochs: int = 0

    @property
    def trains(self) -> bool:
        """Whether any stage trains; the closed form then leaves the rows alone that training is judged on."""
        return max(self.unit_steps, self.model_steps, self.refinement_steps, self.smoothing_epochs) > 0


#: Methods of ``smoothing`` that train.
TRAINED = ("omniquant", "lrquant", "affinequant", "flatquant")
#: The presets by name, the quick ones first: in this order configurations are tried.
PRESETS = {
    "fast": Plan(0, 0, 0),
    "balanced": Plan(400, 0, 150, 20),
    "best": Plan(400, 3000, 150, 20),
}


def plan(spec: QuantSpec) -> Plan:
    """The preset's stages with what the specification says instead."""
    base = PRESETS[spec.preset]

    def chosen(name: str) -> int:
        value = getattr(spec, name)
        return int(getattr(base, name) if value is None else value)

    return Plan(
        0 if spec.rounding == "none" and not spec.learned_steps else chosen("unit_steps"),
        chosen("model_steps"),
        chosen("refinement_steps"),
        chosen("smoothing_epochs") if spec.smoothing in TRAINED else 0,
    )
