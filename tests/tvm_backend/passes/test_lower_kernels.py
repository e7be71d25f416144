"""The pass ``lower_kernels``, before and after."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tests.tvm_backend.passes.tools import (
    BIAS_CONST,
    CONV,
    RNG,
    SCALE,
    WEIGHT,
    W,
    const,
    kernel,
    untouched,
)
from tvm_backend import compat, dialect
from tvm_backend.kernels import registry
from tvm_backend.kernels.cluster_affine import kernel as cluster_affine
from tvm_backend.passes.lower_kernels import LowerKernels
from tvm_backend.target import resolve

(TARGET,) = resolve("avx2" if "avx2" in resolve("portable") else "portable").values()
PLAIN = dialect.with_epilogue(CONV, outputs=("float32",))
RELU = dialect.with_epilogue(PLAIN, clip=(0.0, None))
MAP = [const(RNG.normal(size=shape)) for shape in ((10,), (2, 10), (3, 2), (3, 10), (3, 10))]


def test_lower_kernels():
    """Packed weights in the place of plain ones, and one function for the two layers of equal specification."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                a = kernel(PLAIN, x, WEIGHT, SCALE, BIAS_CONST)
                b = kernel(RELU, x, WEIGHT, SCALE, BIAS_CONST)
                c = kernel(PLAIN, x, WEIGHT, SCALE, BIAS_CONST)
                gv = (a, b, c)
                R.output(gv)
            return gv

    lower = LowerKernels(TARGET)
    after = lower.pass_(Before)

    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", compat.tensor_type((n, 8, 8, 4), "uint8"))
    names = {}
    with builder.function("main", [x]):
        with builder.dataflow():
            results = []
            for spec in (PLAIN, RELU, PLAIN):
                made = registry.lower(spec, TARGET, W)
                if spec not in names:
                    taken = {v.name_hint for v in names.values()}
                    name = f"{made.name}_1" if made.name in taken else made.name
                    names[spec] = builder.add_func(made.prim_func.with_attr("global_symbol", name), name)
                weight, sums = made.pack_weight(W), made.compensation(W)
                out = compat.tensor_type((n, 8, 8, 6), "float32")
                args = [x, compat.constant(weight), compat.constant(sums), SCALE, BIAS_CONST]
                results.append(builder.emit(relax.call_tir(names[spec], args, out)))
            final = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(final)
    compat.assert_structural_equal(after, builder.finalize())

    untouched(lower.pass_, after)
    entries = lower.calls()
    assert [entry.name for entry in entries] == [names[s].name_hint for s in (PLAIN, RELU, PLAIN)]
    assert {(entry.kind, entry.weight_bits, entry.output) for entry in entries} == {("conv", 4, (8, 8, 6))}


def test_lower_kernels_takes_a_correction_as_one_function():
    @I.ir_module
    class Before:
        @R.function
        def main(z: R.Tensor(("n", 10), "float32")):
            with R.dataflow():
                gv = dialect.correction("cluster_affine", [z, *MAP], 0.4, False)
                R.output(gv)
            return gv

    after = LowerKernels(TARGET).pass_(Before)

    spec = cluster_affine.ClusterAffineSpec(
        op="cat::cluster_affine",
        n_classes=10,
        n_clusters=3,
        n_components=2,
        n_features=0,
        rank=0,
        alpha=0.4,
        batch=None,
        dtype="float32",
        n_distance_components=2,
    )
    function = cluster_affine.lower(spec, TARGET).with_attr("global_symbol", "cluster_affine")
    builder = relax.BlockBuilder()
    out = compat.tensor_type((tvm.tirx.Var("n", "int64"), 10), "float32")
    z = relax.Var("z", out)
    with builder.function("main", [z]):
        variable = builder.add_func(function, "cluster_affine")
        with builder.dataflow():
            final = builder.emit_output(relax.call_tir(variable, [z, *MAP], out))
        builder.emit_func_output(final)
    compat.assert_structural_equal(after, builder.finalize())


def test_lower_kernels_leaves_float_alone_and_names_what_no_pass_took():
    @I.ir_module
    class Float:
        @R.function
        def main(x: R.Tensor(("n", 10), "float32")):
            with R.dataflow():
                gv = R.nn.softmax(x)
                R.output(gv)
            return gv

    @I.ir_module
    class Left:
        @R.function
        def main(x: R.Tensor(("n", 10), "float32")):
            with R.dataflow():
                gv = dialect.quantize(x, CONV.input)
                R.output(gv)
            return gv

    untouched(LowerKernels(TARGET).pass_, Float)
    # TVM hands an exception of a pass on as one of its own; the compiler makes it a CompileError again.
    with pytest.raises(RuntimeError, match=r"cat\.quantize was left over"):
        LowerKernels(TARGET).pass_(Left)


def test_lower_kernels_numbers_a_kernel_whose_name_a_function_has():
    """TVM calls its functions after operators (``add``), and so do we: a name stands for one function only."""
    spec = cluster_affine.ClusterAffineSpec(
        op="cat::cluster_affine",
        n_classes=10,
        n_clusters=3,
        n_components=2,
        n_features=0,
        rank=0,
        alpha=0.4,
        batch=None,
        dtype="float32",
        n_distance_components=2,
    )
    function = cluster_affine.lower(spec, TARGET)
    builder = relax.BlockBuilder()
    out = compat.tensor_type((tvm.tirx.Var("n", "int64"), 10), "float32")
    z = relax.Var("z", out)
    with builder.function("main", [z]):
        taken = [
            builder.add_func(function.with_attr("global_symbol", name), name)
            for name in ("cluster_affine", "cluster_affine_1")
        ]
        with builder.dataflow():
            first = builder.emit(relax.call_tir(taken[0], [z, *MAP], out))
            second = builder.emit(relax.call_tir(taken[1], [first, *MAP], out))
            final = builder.emit_output(dialect.correction("cluster_affine", [second, *MAP], 0.4, False))
        builder.emit_func_output(final)
    lower = LowerKernels(TARGET)
    after = lower.pass_(builder.finalize())
    assert [entry.name for entry in lower.calls()] == ["cluster_affine_2"]
    assert compat.function_names(after) == {"main", "cluster_affine", "cluster_affine_1", "cluster_affine_2"}
    relax.transform.AttachGlobalSymbol()(after)
