"""Building, running and comparing kernels, for the kernels' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm.target import Target

from tvm_backend.kernels.kernel import Kernel
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import ConvSpec, Epilogue, GroupedLinearSpec, KernelSpec, QParams, TensorKind


def native_features() -> set[str]:
    """CPU features of this machine as LLVM names them."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split())


TARGETS = {"portable": {"kind": "llvm", "mcpu": "x86-64"}}
if "sse4_1" in native_features():
    TARGETS["sse4.1"] = {"kind": "llvm", "mcpu": "x86-64-v2"}
if "avx2" in native_features():
    TARGETS["avx2"] = {"kind": "llvm", "mcpu": "haswell"}
if "avx_vnni" in native_features():
    TARGETS["avx_vnni"] = {"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni"]}
if "avx_vnni_int8" in native_features():
    TARGETS["avx_vnni_int8"] = {"kind": "llvm", "mcpu": "sierraforest"}
if "avx512bw" in native_features():
    TARGETS["avx512bw"] = {"kind": "llvm", "mcpu": "skylake-avx512"}
if "avx512_vnni" in native_features():
    TARGETS["avx512_vnni"] = {"kind": "llvm", "mcpu": "icelake-server"}


def execute(
    kernel: Kernel, target: Target, arguments: list[NDArray[Any]], outputs: list[NDArray[Any]]
) -> list[NDArray[Any]]:
    """Compile a kernel, run it once and return what it wrote."""
    module = tvm.compile(tvm.IRModule({kernel.name: kernel.prim_func}), target=target)
    given = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arguments]
    taken = [tvm.runtime.tensor(array) for array in outputs]
    module[kernel.name](*given, *taken)
    return [tensor.numpy() for tensor in taken]


def check(
    spec: KernelSpec, target_name: str, arguments: list[NDArray[Any]], expected: tuple[NDArray[Any], ...]
) -> None:
    """Run the kernel for `spec` without a weight and compare with the reference, bit for bit."""
    target = Target(TARGETS[target_name])
    kernel = lower(spec, target)
    blank = [np.full_like(np.ascontiguousarray(array), 77) for array in expected]
    for found, wanted in zip(execute(kernel, target, arguments, blank), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def check_weighted(
    spec: Any,
    target_name: str,
    data: NDArray[Any],
    weight: NDArray[Any],
    rng: np.random.Generator,
    reference: Any,
) -> None:
    """Run a convolution or linear kernel with random constants and compare with the reference, bit for bit."""
    target = Target(TARGETS[target_name])
    check_kernel(lower(spec, target), target, data, weight, rng, reference)


def check_kernel(
    kernel: Kernel,
    target: Target,
    data: NDArray[Any],
    weight: NDArray[Any],
    rng: np.random.Generator,
    reference: Any,
) -> None:
    """The same for a kernel that is there already."""
    arguments, expected = expected_outputs(kernel, data, weight, rng, reference)
    blank = [np.full_like(array, 77) for array in expected]
    for found, wanted in zip(execute(kernel, target, arguments, blank), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def expected_outputs(
    kernel: Kernel, data: NDArray[Any], weight: NDArray[Any], rng: np.random.Generator, reference: Any
) -> tuple[list[NDArray[Any]], tuple[NDArray[Any], ...]]:
    """Arguments of a convolution or linear kernel with random constants, and what it must write."""
    spec: Any = kernel.spec
    channels = weight.shape[0]
    # Scales that spread the sums over the quantized range, so that rounding and clamping both happen.
    spread = float(np.sqrt(weight[0].size) * max(1, np.abs(weight).max()) * 64)
    groups = (spec.groups,) if isinstance(spec, GroupedLinearSpec) else ()
    scale = (rng.uniform(0.1, 2, (*groups, channels)) / spread).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    if spec.epilogue.bounded:  # far from the limit, and often beyond what is stored
        scale, bias = scale * np.float32(1e3), bias * np.float32(1e3)
    further: list[NDArray[Any]] = []
    if groups and spec.tokens:
        zeros = rng.integers(0, spec.input.qmax + 1, len(data))
        further.append(np.stack([rng.uniform(0.1, 3, len(data)), zeros], 1).astype(np.float32))
    shape = reference(spec, data, weight, scale, bias, *further, _zeros(spec, data, weight))[0].shape
    scales = kernel.generator.channelwise(scale)
    arguments = [data, kernel.pack_weight(weight), kernel.compensation(weight), scales, bias]
    if kernel.generator.numbers is not None:
        arguments.append(kernel.generator.numbers)
    if spec.epilogue.residual is not None:
        further.append(random_tensor(spec.epilogue.residual, shape, rng))
    return [*arguments, *further], reference(spec, data, weight, scale, bias, *further)


def _zeros(spec: Any, data: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any] | None:
    if spec.epilogue.residual is None:
        return None
    return np.zeros((1,), np.float32 if spec.epilogue.residual == "float32" else spec.epilogue.residual.dtype)


def random_tensor(kind: TensorKind, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """Random values of a kind, the ends of its range included."""
    if not isinstance(kind, QParams):
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(kind.qmin, kind.qmax + 1, shape).astype(kind.dtype)


def random_weight(bits: int, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """Random signed weights of a bit-width."""
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)


def network_layer(
    size: int, channels_in: int, channels_out: int, kernel: int, stride: int, bits: int, given: QParams
) -> ConvSpec:
    """A layer as networks have it, stored at 2 bits for the next one and at 8 for a shortcut."""
    pad = kernel // 2
    stored = (QParams(0.05, 0, 0, 3, "uint8"), QParams(0.02, 3, 0, 255, "uint8"))
    return ConvSpec(
        batch=None,
        height=size,
        width=size,
        in_channels=channels_in,
        out_channels=channels_out,
        kernel=(kernel, kernel),
        input=given,
        epilogue=Epilogue((0.0, None), None, stored),
        stride=(stride, stride),
        padding=(pad, pad, pad, pad),
        weight_bits=bits,
    )


@st.composite
def qparams(draw: st.DrawFn) -> QParams:
    """Signed and unsigned parameters of 2, 4 and 8 bits with any zero point in range."""
    bits = draw(st.sampled_from([2, 4, 8]))
    signed = draw(st.booleans())
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    scale = draw(st.floats(0.01, 0.9))
    return QParams(scale, draw(st.integers(low, high)), low, high, "int8" if signed else "uint8")


@st.composite
def epilogues(draw: st.DrawFn, residual: bool = True) -> Epilogue:
    """Any activation, residual and one or two outputs."""
    clip = draw(st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.5, 0.75)]))
    kinds = qparams() | st.just("float32")
    outputs = draw(st.lists(kinds, min_size=1, max_size=2))
    extra = draw(st.none() | kinds) if residual else None
    branch = draw(st.none() | qparams()) if residual else None
    return Epilogue(clip, extra, tuple(outputs), branch, bounded=draw(st.booleans()))


batches = st.tuples(st.integers(1, 5), st.booleans())
"""A batch size and whether it is known at compile time."""
