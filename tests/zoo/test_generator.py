"""Random networks through the engine and the export, and some of them through the compiler."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from tests.zoo.generator import Plan, Step, check, plans

# A polynomial of degree eight: its grids are better than plain ones by mean square, and the few values that they clip move the
# outputs four times as far as rounding would.
_STEEP = Plan(
    (
        Step("swish-by-hand", "none", activation="none"),
        Step("plus-number", norm="layer", activation="none", join="multiply"),
        Step("plus-number", activation="none", join="multiply"),
        Step("nothing", "none", activation="none", join="multiply"),
    ),
    "max",
    equalize=False,
)
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=12, deadline=None, suppress_health_check=_QUIET)
@given(plans())
@example(_STEEP)
def test_composed_networks_come_out_as_they_are(plan: Plan) -> None:
    check(plan)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_hundreds_of_composed_networks_come_out_as_they_are(plan: Plan) -> None:
    check(plan)


@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")
@settings(max_examples=4, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_composed_networks_are_compiled(plan: Plan) -> None:
    check(plan, library=True)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")
@settings(max_examples=40, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_many_composed_networks_are_compiled(plan: Plan) -> None:
    check(plan, library=True)


def _first(module: torch.fx.GraphModule, name: str) -> torch.fx.Node:
    return next(node for node in module.graph.nodes if name in str(node.target))


def _coarser(module: torch.fx.GraphModule) -> None:
    """The step of 4 bits where 8 were asked for."""
    first = _first(module, "quantize_per_tensor")
    for node in (first, *first.users):
        node.args = (node.args[0], 17 * node.args[1], *node.args[2:])


def _shifted(module: torch.fx.GraphModule) -> None:
    """A zero point from elsewhere: a quarter of the range is clipped."""
    first = _first(module, "quantize_per_tensor")
    for node in (first, *first.users):
        node.args = (*node.args[:2], node.args[2] + 60, *node.args[3:])


def _stretched(module: torch.fx.GraphModule) -> None:
    """The scale of one channel's weights is half too large."""
    scale = module.get_buffer(str(_first(module, "dequantize_per_channel").args[1].target))
    scale[0] *= 1.5


def _stuck(module: torch.fx.GraphModule) -> None:
    """One weight of a layer at zero."""
    module.get_buffer(str(_first(module, "dequantize_per_channel").args[0].target))[0, 0] = 0


@pytest.mark.parametrize("fault", [_coarser, _shifted, _stretched, _stuck])
def test_a_wrong_scale_zero_point_or_weight_is_found(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding makes is so little that faults which half of the spread would hide are seen."""
    from tests.zoo import generator

    real = generator.quantize

    def faulty(*args, **kwargs):
        module, report = real(*args, **kwargs)
        fault(module)
        module.recompile()
        return module, report

    plan = Plan((Step("nothing"),))
    check(plan)
    monkeypatch.setattr(generator, "quantize", faulty)
    with pytest.raises(AssertionError, match="rounding explains"):
        check(plan)


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails where what is exported is something else than what was quantized."""
    from tests.zoo import generator

    real = generator.export_program
    monkeypatch.setattr(
        generator,
        "export_program",
        lambda _module, inputs: real(generator.Composed(Plan((Step("flip"),))), inputs),
    )
    with pytest.raises(AssertionError):
        check(Plan((Step("nothing"),)))
