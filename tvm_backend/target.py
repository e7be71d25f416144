"""Targets by name, and the processor features that a library built for one needs."""

from __future__ import annotations

import platform
from typing import Any

import tvm
from tvm.target import Target, codegen

from cat_plugin.errors import CompileError
from tvm_backend import compat
from tvm_backend.processor import cpu_features, permit_amx

__all__ = [
    "FEATURES",
    "PORTABLE",
    "is_cuda",
    "machine_of",
    "native",
    "required_features",
    "resolve",
]

FEATURES = {
    # LLVM's name: the kernel's name in /proc/cpuinfo
    "x86_64": {
        "sse4.2": "sse4_2",
        "avx": "avx",
        "f16c": "f16c",
        "fma": "fma",
        "bmi2": "bmi2",
        "avx2": "avx2",
        "avx512f": "avx512f",
        "avx512bw": "avx512bw",
        "avx512dq": "avx512dq",
        "avx512vl": "avx512vl",
        "avx512vnni": "avx512_vnni",
        "avx512bf16": "avx512_bf16",
        "avx512vbmi": "avx512vbmi",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512fp16": "avx512_fp16",
        "avxvnni": "avx_vnni",
        "avxvnniint8": "avx_vnni_int8",
        "amx-tile": "amx_tile",
        "amx-int8": "amx_int8",
    },
    "aarch64": {"dotprod": "asimddp", "i8mm": "i8mm", "fullfp16": "asimdhp", "sve": "sve"},
}
"""By machine, the features that kernels or LLVM make use of and that not every such processor has."""

_PORTABLE: dict[str, dict[str, dict[str, Any]]] = {
    "x86_64": {
        "amx_int8": {"kind": "llvm", "mcpu": "sapphirerapids"},
        "avx512_vnni": {"kind": "llvm", "mcpu": "icelake-server"},
        "avx512bw": {"kind": "llvm", "mcpu": "skylake-avx512"},
        "avx_vnni": {"kind": "llvm", "mcpu": "haswell", "mattr": ["+avxvnni"]},
        "avx2": {"kind": "llvm", "mcpu": "haswell"},
        "baseline": {"kind": "llvm", "mcpu": "x86-64-v2"},
    },
    "aarch64": {
        "dotprod": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]},
        "baseline": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
    },
}

PORTABLE = _PORTABLE.get(platform.machine(), {"baseline": {"kind": "llvm"}})
"""The variants of ``target="portable"``, best first; a library takes the first that the processor can run."""


def native() -> dict[str, Any]:
    """The processor that this runs on, without what a virtual machine or the operating system withholds."""
    description: dict[str, Any] = {"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())}
    available = cpu_features()
    if available is None:
        return description
    if "amx_tile" in available and not permit_amx():
        available -= {"amx_tile", "amx_int8", "amx_bf16"}
    names = FEATURES.get(platform.machine(), {})
    with (target := _build(description)):
        withheld = [
            f"-{feature}"
            for feature, name in names.items()
            if name not in available and codegen.target_has_features(feature, target)
        ]
    return description | ({"mattr": withheld} if withheld else {})


def resolve(target: Any) -> dict[str, Target]:
    """The TVM targets that a name, a mapping or a TVM target stands for.

    Parameters
    ----------
    target : str or dict or tvm.target.Target
        ``"native"``; ``"portable"`` for machines like this one, or one of its variants such as ``"avx2"``;
        ``"portable-x86_64"`` or ``"portable-aarch64"`` for others; a processor's LLVM name such as ``"icelake-server"``; or what TVM takes.

    Returns
    -------
    dict of str to tvm.target.Target
        One target for each variant, best first; a single variant has an empty name.

    Raises
    ------
    CompileError
        The name means nothing.
    """
    if isinstance(target, Target):
        return {"": target}
    if isinstance(target, dict):
        return {"": _build(target)}
    if target == "native":
        return {"": _build(native())}
    if target == "portable":
        return {name: _build(description) for name, description in PORTABLE.items()}
    if isinstance(target, str) and target in PORTABLE:
        return {"": _build(PORTABLE[target])}
    if isinstance(target, str) and (machine := target.removeprefix("portable-")) in _PORTABLE:
        return {name: _build(description) for name, description in _PORTABLE[machine].items()}
    if isinstance(target, str) and target in {
        str(cpu) for cpu in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm"}))
    }:
        return {"": _build({"kind": "llvm", "mcpu": target})}
    raise CompileError(
        f"target {target!r} is not known; give 'native', 'portable', 'portable-aarch64', the LLVM name of a processor "
        "such as 'icelake-server', or a TVM target"
    )


def _build(description: dict[str, Any]) -> Target:
    try:
        return Target(description)
    except Exception as error:
        raise CompileError(
            f"TVM {tvm.__version__} does not accept the target {description}: {error}"
        ) from error


def is_cuda(target: Target) -> bool:
    """Whether code is generated for a CUDA device."""
    return str(getattr(target.kind, "name", target.kind)) == "cuda"


def machine_of(target: Target) -> str:
    """The machine, as ``platform.machine()`` names it, that code for a target runs on."""
    if is_cuda(target):
        return platform.machine()
    return compat.target_machine(target) or platform.machine()


def required_features(target: Target) -> list[str]:
    """The features, as ``/proc/cpuinfo`` names them, that code for a target may use; empty for a CUDA device."""
    if is_cuda(target):
        return []
    names = FEATURES.get(machine_of(target), {})
    with target:
        return [name for feature, name in names.items() if codegen.target_has_features(feature, target)]
