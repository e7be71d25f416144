"""Random networks through the engine and the export, and some of them through the compiler."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import HealthCheck, given, settings

from tests.zoo.generator import Plan, Step, check, plans

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_composed_networks_come_out_as_they_are(plan: Plan) -> None:
    check(plan)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_hundreds_of_composed_networks_come_out_as_they_are(plan: Plan) -> None:
    check(plan)


@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed")
@settings(max_examples=6, deadline=None, suppress_health_check=_QUIET)
@given(plans())
def test_composed_networks_are_compiled(plan: Plan) -> None:
    check(plan, library=True)


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
