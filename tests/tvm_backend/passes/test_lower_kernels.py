"""The pass ``lower_kernels``, before and after."""

from __future__ import annotations

import dataclasses

import numpy as np
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
from tvm_backend.objects import symbol_of
from tvm_backend.passes.lower_kernels import LowerKernels
from tvm_backend.target import resolve

(TARGET,) = resolve("avx2" if "avx2" in resolve("portable") else "portable").values()
PLAIN = dialect.with_epilogue(CONV, outputs=("float32",))
RELU = dialect.with_epilogue(PLAIN, clip=(0.0, None))
MAP = [const(RNG.normal(size=shape)) for shape in ((10,), (2, 10), (3, 2), (3, 10), (3, 10))]


def test_lower_kernels():
    """Packed weights in the place of plain ones, and one function for the two layers of equal form."""

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
                    name = symbol_of(made.name, made.generator.form)
                    names[spec] = builder.add_func(made.declaration.with_attr("global_symbol", name), name)
                weight, sums = made.pack_weight(W), made.compensation(W)
                out = compat.tensor_type((n, 8, 8, 6), "float32")
                args = [x, compat.constant(weight), compat.constant(sums), SCALE, BIAS_CONST]
                args.append(compat.constant(made.generator.numbers))
                results.append(builder.emit(relax.call_tir(names[spec], args, out)))
            final = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(final)
    compat.assert_structural_equal(after, builder.finalize())

    untouched(lower.pass_, after)
    assert set(lower.sources) == {name.name_hint for name in names.values()}
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
    name = symbol_of("cluster_affine", spec)
    function = cluster_affine.declaration(spec).with_attr("global_symbol", name)
    builder = relax.BlockBuilder()
    out = compat.tensor_type((tvm.tirx.Var("n", "int64"), 10), "float32")
    z = relax.Var("z", out)
    with builder.function("main", [z]):
        variable = builder.add_func(function, name)
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


def test_layers_that_differ_in_numbers_only_share_a_function():
    finer = dataclasses.replace(CONV.input, scale=0.5 * CONV.input.scale)
    other = dialect.with_epilogue(dataclasses.replace(CONV, input=finer), clip=(0.0, None), outputs=(finer,))
    first = dialect.with_epilogue(CONV, clip=(0.0, None), outputs=(CONV.input,))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor(("n", 8, 8, 4), "uint8")):
            with R.dataflow():
                a = kernel(first, x, WEIGHT, SCALE, BIAS_CONST)
                b = kernel(other, x, WEIGHT, SCALE, BIAS_CONST)
                gv = (a, b)
                R.output(gv)
            return gv

    lower = LowerKernels(TARGET)
    lower.pass_(Before)
    assert len(lower.calls()) == 2
    assert len(lower.sources) == 1
    kernels = [registry.lower(spec, TARGET, W) for spec in (first, other)]
    compat.assert_structural_equal(*(each.generator.build("same") for each in kernels))
    assert not np.array_equal(*(each.generator.numbers for each in kernels))
