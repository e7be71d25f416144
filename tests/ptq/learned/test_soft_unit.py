"""Running a unit with gradients."""

from __future__ import annotations

import gc
import weakref

from cat_plugin.ptq.graph.units import whole_model
from cat_plugin.ptq.learned.soft_unit import float_call, run_nodes
from tests.ptq.learned.prepared import prepare


def test_activations_of_a_step_go_without_the_garbage_collector():
    _, module, _, _, x = prepare()
    whole = whole_model(module)
    seen = []

    def call(child, value):
        result = float_call(child, value)
        seen.append(weakref.ref(result))
        return result

    gc.collect()
    gc.disable()
    try:
        run_nodes(module, whole.nodes, {whole.source: x.clone()}, call)
        assert seen
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()
