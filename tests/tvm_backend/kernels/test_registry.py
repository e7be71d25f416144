"""The table of generators: every kind on every device, chosen in order; and what it takes to add one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import tvm
from tvm.target import Target

from cat_plugin.errors import CompileError
from tests.tvm_backend.kernels.test_spec import FACTS, S8, U8
from tvm_backend.kernels import spec as specs
from tvm_backend.kernels import tir
from tvm_backend.kernels.cpu.conv2d import DirectConv
from tvm_backend.kernels.cpu.conv2d_amx import AmxConv
from tvm_backend.kernels.cpu.depthwise import Depthwise
from tvm_backend.kernels.cpu.depthwise_dot import DepthwiseDot
from tvm_backend.kernels.cpu.generator import CpuGenerator
from tvm_backend.kernels.cpu.linear import Linear
from tvm_backend.kernels.cpu.linear_amx import AmxLinear
from tvm_backend.kernels.cuda.dp4a import Dp4aProduct
from tvm_backend.kernels.cuda.grouped import Grouped
from tvm_backend.kernels.cuda.mma import MmaProduct
from tvm_backend.kernels.registry import KERNELS, Entry, lower, machine_of, reference
from tvm_backend.kernels.spec import ConvSpec, Epilogue, KernelSpec, LinearSpec, Operand

OUT = Epilogue((0.0, None), None, (U8,))
DENSE = ConvSpec(None, 14, 14, 64, 64, (3, 3), U8, OUT, padding=(1, 1, 1, 1))
DEPTHWISE = ConvSpec(None, 6, 6, 32, 32, (3, 3), U8, OUT, groups=32)
ROWS = LinearSpec(None, 64, 10, U8, OUT)

TARGETS = {
    "amx": {"kind": "llvm", "mcpu": "sapphirerapids"},
    "avx512": {"kind": "llvm", "mcpu": "icelake-server"},
    "avx512bw": {"kind": "llvm", "mcpu": "skylake-avx512"},
    "avx2": {"kind": "llvm", "mcpu": "haswell"},
    "tensor cores": {"kind": "cuda", "arch": "sm_90"},
    "dp4a": {"kind": "cuda", "arch": "sm_75"},
}


@pytest.mark.parametrize(
    ("target", "spec", "generator", "variant"),
    [
        ("amx", DENSE, AmxConv, "amx_int8"),
        ("amx", ROWS, AmxLinear, "amx_int8"),
        ("amx", DEPTHWISE, DepthwiseDot, "avx512_vnni"),
        ("avx512", DENSE, DirectConv, "avx512_vnni"),
        ("avx512", ROWS, Linear, "avx512_vnni"),
        ("avx512bw", DENSE, DirectConv, "avx512bw"),
        ("avx512bw", DEPTHWISE, DepthwiseDot, "avx512bw"),
        ("avx512bw", replace(DEPTHWISE, weight_bits=4), DepthwiseDot, "avx512bw_bytes"),
        ("avx2", DEPTHWISE, DepthwiseDot, "avx2"),
        ("avx2", replace(DEPTHWISE, weight_bits=4), DepthwiseDot, "avx2_bytes"),
        ("avx2", replace(DEPTHWISE, in_channels=33, out_channels=33, groups=33), Depthwise, "avx2"),
        ("avx2", DENSE, DirectConv, "avx2"),
        ("tensor cores", DENSE, MmaProduct, "cuda_mma"),
        ("tensor cores", ROWS, MmaProduct, "cuda_mma"),
        ("tensor cores", DEPTHWISE, Grouped, "cuda"),
        ("dp4a", DENSE, Dp4aProduct, "cuda_dp4a"),
    ],
)
def test_the_first_that_takes_it_writes_it(
    target: str, spec: KernelSpec, generator: type, variant: str
) -> None:
    kernel = lower(spec, Target(TARGETS[target]))
    assert type(kernel.generator) is generator
    assert kernel.variant == variant
    assert kernel.machine.has_tile_state == (variant == "amx_int8")
    assert lower(spec, Target(TARGETS[target])) is kernel


@pytest.mark.parametrize("target", ["avx2", "tensor cores"])
@pytest.mark.parametrize("operation", FACTS)
def test_every_kind_has_a_kernel_on_every_device(operation: str, target: str) -> None:
    spec, name, arguments, moved = FACTS[operation]
    if not KERNELS[type(spec)].generators(machine_of(Target(TARGETS[target]))):
        with pytest.raises(CompileError, match="there is no kernel for"):
            lower(spec, Target(TARGETS[target]))
        return
    kernel = lower(spec, Target(TARGETS[target]))
    assert kernel.name == ("cuda_" if target == "tensor cores" else "") + name
    assert kernel.prim_func.attrs["global_symbol"] == kernel.name
    assert len(kernel.prim_func.params) == len(arguments)
    assert kernel.bytes == moved
    with pytest.raises(CompileError, match="has no weight to pack"):
        kernel.pack_weight(np.zeros((1, 1)))


def test_every_specification_is_in_the_table() -> None:
    kinds = {getattr(specs, name) for name in specs.__all__ if name.endswith("Spec")}
    bases = {specs.KernelSpec, specs.EpilogueSpec, specs.WeightedSpec}
    assert set(KERNELS) == kinds - bases
    assert all(entry.cpu for entry in KERNELS.values())
    # On a CUDA device TVM's own functions are left in place.
    left = {specs.TokensSpec, specs.GroupedLinearSpec, specs.RotationSpec}
    assert {kind for kind, entry in KERNELS.items() if not entry.cuda} == left


@dataclass(frozen=True)
class NegateSpec(KernelSpec):
    """Bytes with the other sign, for a test."""

    operation: ClassVar[str] = "negate"

    batch: int | None
    count: int

    @property
    def name(self) -> str:
        return f"negate_{self.count}"

    @property
    def reads(self) -> tuple[Operand, ...]:
        return (Operand("data", (self.count,), S8),)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.count,)

    @property
    def out_kinds(self) -> tuple[Any, ...]:
        return (S8,)


@dataclass(frozen=True)
class Negate(CpuGenerator[NegateSpec]):
    """Its generator."""

    def build(self, name: str) -> Any:
        batch = tir.batch_extent(self.spec.batch)
        with tir.Function(name) as function:
            data, output = function.buffers(self.arguments(batch))
            with tir.loop(batch) as row, tir.loop(self.spec.count) as i:
                tir.store(output, tir.constant(0, "int8") - tir.load(data, [row, i]), [row, i])
        return function.result


def test_a_new_kernel_is_a_specification_a_generator_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, target = NegateSpec(None, 5), Target(TARGETS["avx2"])
    with pytest.raises(CompileError, match="there is no kernel for NegateSpec on avx2"):
        lower(spec, target)
    monkeypatch.setitem(KERNELS, NegateSpec, Entry(lambda spec, data: (-data,), cpu=(Negate,)))
    kernel = lower(spec, target)
    assert (kernel.name, kernel.variant, kernel.bytes) == ("negate_5", machine_of(target).name, 10)
    values = np.arange(-7, 8, dtype=np.int8).reshape(3, 5)
    result = tvm.runtime.tensor(np.zeros_like(values))
    module = tvm.compile(tvm.IRModule({kernel.name: kernel.prim_func}), target=Target({"kind": "llvm"}))
    module[kernel.name](tvm.runtime.tensor(values), result)
    np.testing.assert_array_equal(result.numpy(), *reference(spec)(spec, values))
    with pytest.raises(CompileError, match="there is no kernel for NegateSpec on cuda_mma"):
        lower(spec, Target(TARGETS["tensor cores"]))
