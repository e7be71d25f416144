"""Instruction sets: which one a target has, and what each says of itself."""

from __future__ import annotations

import pytest
from tvm.target import Target

from tvm_backend.kernels.cpu.isa import (
    INSTRUCTION_SETS,
    Amx,
    Avx2,
    Avx2Bytes,
    Avx512Vnni,
    AvxVnni,
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
        ({"kind": "llvm", "mcpu": "icelake-server", "mattr": ["-avx512vnni"]}, Avx2()),
        ({"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni"]}, AvxVnni()),
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


def test_bytes_are_multiplied_where_two_products_fit_into_16_bits() -> None:
    assert Avx2().for_values(255, 15) == Avx2Bytes()
    assert Avx2().for_values(127, 128) == Avx2Bytes()
    assert Avx2().for_values(128, 128) == Avx2()
    assert Sse41().for_values(255, 15) == Sse41()
