"""The pass ``fold_tokens``, before and after."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.tvm_backend.passes.tools import check, kernel, untouched
from tvm_backend import dialect
from tvm_backend.kernels.spec import TokensSpec
from tvm_backend.passes.fold_tokens import FoldTokens

GRID = {"qmin": 0, "qmax": 15, "dtype": "uint8"}
SPEC = TokensSpec(None, 8, 15, float(np.float32(0.9)))
INF = float("inf")


def graph(axis=-1, share=0.9, other=0.9, steps=1 / 15, least=1e-8, zero_of_other=False):
    """What the engine writes, or something near it."""
    builder = relax.BlockBuilder()
    n = T.Var("n", "int64")
    x = relax.Var("x", R.Tensor((n, 3, 8), "float32"))

    def number(value):
        return relax.const(np.float32(value))

    with builder.function("main", [x]):
        with builder.dataflow():
            emit = builder.emit
            low = emit(relax.op.clip(emit(relax.op.min(x, [axis], keepdims=True)), -INF, 0.0))
            high = emit(relax.op.clip(emit(relax.op.max(x, [axis], keepdims=True)), 0.0, INF))
            low = emit(relax.op.multiply(low, number(share)))
            high = emit(relax.op.multiply(high, number(other)))
            width = emit(relax.op.multiply(emit(relax.op.subtract(high, low)), number(steps)))
            scale = emit(relax.op.clip(width, least, INF))
            negative = emit(relax.op.negative(high if zero_of_other else low))
            ratio = emit(relax.op.round(emit(relax.op.divide(negative, scale))))
            zero = emit(relax.op.astype(ratio, "int64"))
            integers = emit(dialect.quantize_per_token(x, scale, zero, GRID))
            out = builder.emit_output(dialect.dequantize_per_token(integers, scale, zero, GRID))
        builder.emit_func_output(out)
    return builder.finalize()


def test_fold_tokens():
    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor(("n", 3, 8), "float32")):
            n = T.int64()
            with R.dataflow():
                lv = R.reshape(x, R.shape([n * 3, 8]))
                lv1 = kernel(SPEC, lv)
                lv2 = lv1[0]
                lv3 = lv1[1]
                lv4 = dialect.dequantize_rows(lv2, lv3)
                gv = R.reshape(lv4, R.shape([n, 3, 8]))
                R.output(gv)
            return gv

    check(FoldTokens, graph(), After)


@pytest.mark.parametrize(
    "change",
    [
        {"axis": 1},
        {"other": 0.8},
        {"steps": 1 / 16},
        {"least": 1e-7},
        {"zero_of_other": True},
    ],
)
def test_other_grids_are_left_alone(change):
    untouched(FoldTokens, graph(**change))
