"""The pass ``bound_outputs``, before and after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    CONV,
    Q2,
    Q8,
    S8,
    SCALE,
    WEIGHT,
    check,
    const,
    kernel,
    untouched,
)
from tvm_backend import dialect
from tvm_backend.kernels.spec import (
    Epilogue,
)
from tvm_backend.passes.bound_outputs import BoundOutputs


@pytest.mark.parametrize("kinds", [(Q8,), (Q8, Q2)])
def test_bound_outputs(kinds):
    relu6 = dataclasses.replace(CONV, epilogue=Epilogue((0.0, 6.0), S8, kinds, Q2))
    bounded = dataclasses.replace(CONV, epilogue=Epilogue((0.0, 6.0), S8, kinds, Q2, bounded=True))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), r: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(relu6, x, WEIGHT, SCALE, BIAS_CONST, r)
                R.output(gv)
            return gv

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8"), r: R.Tensor(("n", 8, 8, 6), "int8")):
            with R.dataflow():
                gv = kernel(bounded, x, WEIGHT, SCALE, BIAS_CONST, r)
                R.output(gv)
            return gv

    check(BoundOutputs, Before, After)


def test_bound_outputs_needs_integers_and_bounds():
    floats = dialect.with_epilogue(CONV, outputs=("float32",))
    one = dialect.with_epilogue(CONV, outputs=(Q8,))
    huge = const(np.full(6, 1e6))

    @I.ir_module
    class Mod:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                a = kernel(floats, x, WEIGHT, SCALE, BIAS_CONST)
                b = kernel(one, x, WEIGHT, huge, BIAS_CONST)
                gv = (a, b)
                R.output(gv)
            return gv

    untouched(BoundOutputs, Mod)
