"""The pass ``unfold_border``: which kernels it opens, and that these compute what the kernels do."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import Q2, Q8, S8, kernel, untouched
from tvm_backend.kernels.cpu.border import dequantize_reference, quantize_reference
from tvm_backend.kernels.spec import DequantizeSpec, QuantizeSpec
from tvm_backend.passes.unfold_border import UnfoldBorder
from tvm_backend.target import resolve

FROM, TO = DequantizeSpec(None, (2, 8), S8), QuantizeSpec(None, (2, 8), (Q8,))


def test_kernels_that_stand_alone_stay():
    moved = QuantizeSpec(None, (3, 8, 8), (S8,), to_channels_last=True)

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32"), q: R.Tensor(("n", 2, 8), "int8")):
            with R.dataflow():
                lv = R.sigmoid(x)
                lv1 = kernel(moved, lv)
                lv2 = kernel(FROM, q)
                lv3 = kernel(TO, lv2)
                gv = (lv1, lv3)
                R.output(gv)
            return gv

    untouched(UnfoldBorder, Module)


@pytest.mark.parametrize("q", [Q8, Q2, S8], ids=["uint8", "two bits", "int8"])
def test_opened_kernels_compute_the_same(q):
    into = QuantizeSpec(None, (2, 8), (q,))

    @I.ir_module
    class Module:
        @R.function
        def main(data: R.Tensor(("n", 2, 8), "int8"), x: R.Tensor(("n", 2, 8), "float32")):
            with R.dataflow():
                lv = kernel(FROM, data)
                lv1 = R.add(lv, x)
                gv = kernel(into, lv1)
                R.output(gv)
            return gv

    mod = UnfoldBorder(Module)
    assert "cat.kernel" not in mod.script()
    mod = relax.get_pipeline("zero")(mod)
    target = next(iter(resolve("native").values()))
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    rng = np.random.default_rng(0)
    data = rng.integers(-128, 128, (50, 2, 8)).astype(np.int8)
    (wide,) = dequantize_reference(FROM, data)
    # sums on edges between two integers, far outside, and not a number
    x = np.float32(q.step) * (rng.integers(-400, 400, wide.shape) / 2).astype(np.float32) - wide
    x[0, 0, :3] = [np.nan, np.inf, -np.inf]
    found = machine["main"](*map(tvm.runtime.tensor, (data, x))).numpy()
    (wanted,) = quantize_reference(into, wide + x)
    np.testing.assert_array_equal(found, wanted)
