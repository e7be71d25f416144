"""What the presets mean."""

from __future__ import annotations

from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.presets import plan
from tests.ptq.models import SmallResNet, randomise, small_inputs


def test_presets_name_the_stages():
    fast, balanced, best = (plan(QuantSpec(preset=p)) for p in ("fast", "balanced", "best"))
    assert (fast.unit_steps, fast.model_steps, fast.refinement_steps) == (0, 0, 0)
    assert best.unit_steps >= balanced.unit_steps > 0
    assert best.model_steps > balanced.model_steps == 0
    assert plan(QuantSpec(preset="best", unit_steps=7)).unit_steps == 7
    frozen = plan(QuantSpec(preset="best", rounding="none", learned_steps=False))
    assert frozen.unit_steps == 0
    _, report = quantize(
        randomise(SmallResNet()), QuantSpec(preset="fast", batch_size=8), small_inputs(16, 3, 12, 12)
    )
    assert report.units == []
