"""Instruction sets: which one a target has, and what each says of itself."""

from __future__ import annotations

import pytest
from tvm.target import Target

from tvm_backend.kernels.cpu.isa import (
    INSTRUCTION_SETS,
    Amx,
    Avx2,
    Avx2Bytes,
    Avx512Bw,
    Avx512Bytes,
    Avx512Vnni,
    AvxVnni,
    AvxVnniInt8,
    InstructionSet,
    NeonDot,
    Portable,
    Sse41,
    select,
)
from tvm_backend.target import FEATURES


@pytest.mark.parametrize(
    ("description", "isa"),
    [
        ({"kind": "llvm", "mcpu": "sapphirerapids"}, Amx()),
        ({"kind": "llvm", "mcpu": "sapphirerapids", "mattr": ["-amx-int8"]}, Avx512Vnni()),
        ({"kind": "llvm", "mcpu": "icelake-server"}, Avx512Vnni()),
        ({"kind": "llvm", "mcpu": "icelake-server", "mattr": ["-avx512vnni"]}, Avx512Bw()),
        ({"kind": "llvm", "mcpu": "skylake-avx512"}, Avx512Bw()),
        ({"kind": "llvm", "mcpu": "knl"}, Avx2()),
        ({"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni"]}, AvxVnni()),
        ({"kind": "llvm", "mcpu": "alderlake"}, AvxVnni()),
        ({"kind": "llvm", "mcpu": "arrowlake"}, AvxVnniInt8()),
        ({"kind": "llvm", "mcpu": "sierraforest"}, AvxVnniInt8()),
        ({"kind": "llvm", "mcpu": "haswell"}, Avx2()),
        ({"kind": "llvm", "mcpu": "x86-64-v2"}, Sse41()),
        ({"kind": "llvm", "mcpu": "x86-64"}, Portable()),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]}, NeonDot()),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}, Portable()),
        ({"kind": "c"}, Portable()),
    ],
)
def test_a_target_has_the_best_set_whose_features_it_has(description: dict, isa: InstructionSet) -> None:
    assert select(Target(description)) == isa


@pytest.mark.parametrize("isa", INSTRUCTION_SETS, ids=lambda isa: isa.name)
def test_features_are_those_that_a_library_asks_the_processor_for(isa: InstructionSet) -> None:
    known = {"sse4.1"}.union(*FEATURES.values())  # every processor with SSE4.2 has it
    assert isa.features
    assert set(isa.features) <= known


@pytest.mark.parametrize(("wide", "narrow"), [(Avx2(), Avx2Bytes), (Avx512Bw(), Avx512Bytes)])
def test_bytes_are_multiplied_where_two_products_fit_into_16_bits(
    wide: InstructionSet, narrow: type[InstructionSet]
) -> None:
    assert wide.for_values(127, 128) == narrow(depth=1)
    assert wide.for_values(255, 15) == narrow(depth=4), "4 * 2 * 255 * 15 is 30600"
    assert wide.for_values(15, 15) == narrow(depth=64)
    assert wide.for_values(3, 3) == narrow(depth=1024)
    assert wide.for_values(128, 128) == wide, "2 * 128 * 128 is one too many"
    assert wide.for_sums(255, 128) == narrow(depth=1)
    assert wide.for_sums(255, 129) == wide
    assert wide.for_sums(255, 128, 128) == narrow(depth=2)
    assert wide.for_sums(255, 128, 129) == narrow(depth=1)
    assert narrow(depth=2).holds(255, 128, 128)
    assert not narrow(depth=2).holds(255, 128, 129)
    assert not narrow(depth=1).holds(255, 129, 129)
    assert narrow(depth=4).for_sums(255, 16) == narrow(depth=8), "symmetric 4-bit weights reach 8, not 15"
    assert narrow(depth=8).holds(255, 16)
    assert not narrow(depth=8).holds(255, 17)
    assert Sse41().for_values(255, 15) == Sse41()
