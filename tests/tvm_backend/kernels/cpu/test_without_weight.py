"""Pooling, addition, concatenation, shortcuts and the float border against their references."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target

from tests.tvm_backend.kernels.tools import TARGETS, batches, check, epilogues, qparams, random_tensor
from tvm_backend import compat
from tvm_backend.kernels.cpu import border, concat, elementwise, pool, subsample
from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import (
    ConcatSpec,
    DequantizeSpec,
    ElementwiseSpec,
    Epilogue,
    PoolSpec,
    QParams,
    QuantizeSpec,
    SubsampleSpec,
)

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple)


@st.composite
def poolings(draw: st.DrawFn) -> tuple[PoolSpec, int]:
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    batch, known = draw(batches)
    own = draw(qparams())
    epilogue = draw(epilogues() | st.just(Epilogue(outputs=(own,))))
    spec = PoolSpec(
        kind=draw(st.sampled_from(["max", "avg"])),
        batch=batch if known else None,
        height=kernel[0] + draw(st.integers(0, 8)),
        width=kernel[1] + draw(st.integers(0, 8)),
        channels=draw(st.integers(1, 70)),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        input=own,
        epilogue=epilogue,
        padding=tuple(draw(st.integers(0, kernel[i % 2] // 2)) for i in range(4)),
        ceil_mode=draw(st.booleans()),
        count_include_pad=draw(st.booleans()),
    )
    return spec, batch


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=20, deadline=None)
@given(case=poolings(), seed=SEEDS)
def test_pooling(target, case, seed):
    spec, batch = case
    rng = np.random.default_rng(seed)
    data = random_tensor(spec.input, (batch, spec.height, spec.width, spec.channels), rng)
    arguments = [data]
    if spec.epilogue.residual is not None:
        shape = (batch, spec.out_height, spec.out_width, spec.channels)
        arguments.append(random_tensor(spec.epilogue.residual, shape, rng))
    check(spec, target, arguments, pool.reference(spec, *arguments))


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_integer_is_the_same_on_every_grid(target):
    def generator(kind, scale, zero_point):
        own = QParams(scale, zero_point, 0, 255, "uint8")
        shape = {"batch": None, "height": 8, "width": 8, "channels": 5, "kernel": (3, 3), "stride": (2, 2)}
        spec = PoolSpec(
            kind=kind, **shape, input=own, epilogue=Epilogue(outputs=(own,)), padding=(1, 1, 1, 1)
        )
        return lower(spec, Target(TARGETS[target])).generator

    one, other = generator("max", 0.1, 0), generator("max", 0.2, 7)
    assert one.form == other.form
    compat.assert_structural_equal(one.build("pool"), other.build("pool"))
    assert generator("avg", 0.1, 0).form != generator("avg", 0.2, 7).form


@settings(max_examples=30, deadline=None)
@given(case=poolings(), seed=SEEDS)
def test_pooling_reference_equals_torch(case, seed):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    spec, batch = case
    top, left = spec.padding[:2]
    if spec.padding != (top, left, top, left):
        return
    plain = PoolSpec(**{**vars(spec), "epilogue": Epilogue()})
    data = random_tensor(
        spec.input, (batch, spec.height, spec.width, spec.channels), np.random.default_rng(seed)
    )
    real = torch.from_numpy((data.astype(np.float64) - spec.input.zero_point) * spec.input.scale).permute(
        0, 3, 1, 2
    )
    if spec.kind == "max":
        expected = torch.nn.functional.max_pool2d(
            real, spec.kernel, spec.stride, (top, left), ceil_mode=spec.ceil_mode
        )
    else:
        expected = torch.nn.functional.avg_pool2d(
            real, spec.kernel, spec.stride, (top, left), spec.ceil_mode, spec.count_include_pad
        )
    np.testing.assert_allclose(
        pool.reference(plain, data)[0], expected.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=15, deadline=None)
@given(
    batch=batches,
    shape=SHAPES,
    kinds=st.lists(qparams() | st.just("float32"), min_size=1, max_size=2),
    epilogue=epilogues(residual=False),
    seed=SEEDS,
)
def test_addition_and_requantization(target, batch, shape, kinds, epilogue, seed):
    rng = np.random.default_rng(seed)
    spec = ElementwiseSpec(batch[0] if batch[1] else None, shape, tuple(kinds), epilogue)
    inputs = [random_tensor(kind, (batch[0], *shape), rng) for kind in kinds]
    check(spec, target, inputs, elementwise.reference(spec, *inputs))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=15, deadline=None)
@given(
    batch=batches,
    shape=st.sampled_from([(), (3,), (4, 5)]),
    parts=st.lists(st.tuples(st.integers(1, 40), qparams()), min_size=1, max_size=3),
    epilogue=epilogues(residual=False),
    same=st.booleans(),
    seed=SEEDS,
)
def test_concatenation(target, batch, shape, parts, epilogue, same, seed):
    rng = np.random.default_rng(seed)
    if same:
        epilogue = Epilogue(outputs=(parts[0][1],))
    channels, kinds = zip(*parts, strict=True)
    spec = ConcatSpec(batch[0] if batch[1] else None, shape, channels, kinds, epilogue)
    inputs = [random_tensor(kind, (batch[0], *shape, count), rng) for count, kind in parts]
    check(spec, target, inputs, concat.reference(spec, *inputs))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=10, deadline=None)
@given(
    batch=batches,
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pad=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    kind=qparams(),
    seed=SEEDS,
)
def test_subsampling(target, batch, size, stride, pad, kind, seed):
    spec = SubsampleSpec(batch[0] if batch[1] else None, *size, stride, *pad, kind)
    data = random_tensor(kind, (batch[0], *size), np.random.default_rng(seed))
    check(spec, target, [data], subsample.reference(spec, data))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=15, deadline=None)
@given(
    batch=batches,
    # Images, whose few channels are put together in registers, among them.
    shape=SHAPES | st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 70)),
    kinds=st.lists(qparams(), min_size=1, max_size=2),
    move=st.booleans(),
    seed=SEEDS,
)
def test_quantization_and_back(target, batch, shape, kinds, move, seed):
    rng = np.random.default_rng(seed)
    known = batch[0] if batch[1] else None
    move = move and len(shape) == 3
    real = (rng.normal(size=(batch[0], *shape)) * kinds[0].scale * 4).astype(np.float32)
    # Exact halves, where rounding to even shows.
    real.reshape(-1)[::3] = (np.rint(real.reshape(-1)[::3] / kinds[0].scale) + 0.5) * kinds[0].scale
    real.reshape(-1)[1::5], real.reshape(-1)[2::7], real.reshape(-1)[4::7] = np.nan, np.inf, -np.inf
    spec = QuantizeSpec(known, shape, tuple(kinds), move)
    check(spec, target, [real], border.quantize_reference(spec, real))
    integers = random_tensor(kinds[0], (batch[0], *shape), rng)
    back = DequantizeSpec(known, shape, kinds[0], move)
    check(back, target, [integers], border.dequantize_reference(back, integers))


@settings(max_examples=50, deadline=None)
@given(kind=qparams(), seed=SEEDS)
def test_quantization_reference_equals_torch(kind, seed):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    importlib.import_module("cat_plugin.torch_compat").register_quantized_decomposed()
    rng = np.random.default_rng(seed)
    real = (rng.normal(size=4096) * kind.scale * (kind.qmax - kind.qmin)).astype(np.float32)
    real[::3] = (np.rint(real[::3] / kind.scale) + 0.5) * kind.scale
    real[1::5], real[2::7], real[4::7] = np.nan, np.inf, -np.inf
    spec = QuantizeSpec(1, (4096,), (kind,))
    expected = torch.ops.quantized_decomposed.quantize_per_tensor(
        torch.from_numpy(real), kind.scale, kind.zero_point, kind.qmin, kind.qmax, getattr(torch, kind.dtype)
    )
    np.testing.assert_array_equal(border.quantize_reference(spec, real)[0], expected.numpy())
    back = DequantizeSpec(1, (4096,), kind)
    again = torch.ops.quantized_decomposed.dequantize_per_tensor(
        expected, kind.scale, kind.zero_point, kind.qmin, kind.qmax, getattr(torch, kind.dtype)
    )
    np.testing.assert_array_equal(border.dequantize_reference(back, expected.numpy())[0], again.numpy())


def test_overlarge_zero_point_is_refused():
    from cat_plugin.errors import CompileError

    with pytest.raises(CompileError, match="zero point 300"):
        QParams(0.1, 300, 0, 255, "uint8")
