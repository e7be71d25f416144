"""What holds for every pass."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")

from tvm.script import ir as I  # noqa: E402
from tvm.script import relax as R  # noqa: E402

from tests.tvm_backend.passes.tools import untouched  # noqa: E402
from tvm_backend.passes.pipeline import INTEGER_PASSES  # noqa: E402


def test_passes_leave_a_float_graph_untouched():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32"), w: R.Tensor((4, 3, 3, 3), "float32")):
            with R.dataflow():
                lv = R.nn.conv2d(x, w, padding=(1, 1))
                lv1 = R.nn.relu(lv)
                lv2 = R.nn.max_pool2d(lv1, (2, 2), (2, 2))
                gv = R.nn.softmax(lv2, axis=1)
                R.output(gv)
            return gv

    for step in INTEGER_PASSES:
        untouched(step, Module)
