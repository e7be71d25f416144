"""Targets by name, and the processor features that a library built for one needs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.target import Target, codegen

from cat_plugin.errors import CompileError

__all__ = ["FEATURES", "PORTABLE", "required_features", "resolve"]

FEATURES = {
    # LLVM's name: the kernel's name in /proc/cpuinfo
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
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
}
"""The features of x86 processors that kernels or LLVM make use of."""

PORTABLE: dict[str, dict[str, Any]] = {
    "avx512_vnni": {"kind": "llvm", "mcpu": "icelake-server"},
    "avx2": {"kind": "llvm", "mcpu": "haswell"},
    "baseline": {"kind": "llvm", "mcpu": "x86-64-v2"},
}
"""The variants of ``target="portable"``, best first; a library takes the first that the processor can run."""


def native() -> dict[str, Any]:
    """The processor that this runs on."""
    return {"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())}


def resolve(target: Any) -> dict[str, Target]:
    """The TVM targets that a name, a mapping or a TVM target stands for.

    Parameters
    ----------
    target : str or dict or tvm.target.Target
        ``"native"``, ``"portable"``, a processor's LLVM name such as ``"icelake-server"``, or what TVM takes.

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
    if isinstance(target, str) and target in {
        str(cpu) for cpu in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm"}))
    }:
        return {"": _build({"kind": "llvm", "mcpu": target})}
    raise CompileError(
        f"target {target!r} is not known; give 'native', 'portable', the LLVM name of a processor "
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


def required_features(target: Target) -> list[str]:
    """The features, as ``/proc/cpuinfo`` names them, that code for an x86 target may use; empty for other targets."""
    if is_cuda(target):
        return []
    triple = str(target.attrs.get("mtriple", "") or codegen.llvm_get_system_triple())
    if not triple.startswith(("x86_64", "i686")):
        return []
    with target:
        return [
            name for feature, name in FEATURES.items() if bool(codegen.target_has_features(feature, target))
        ]
