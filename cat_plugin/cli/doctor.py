"""``cat-ptq doctor``: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
import shutil
from typing import Annotated, Any

import typer
from rich.table import Table

from cat_plugin.cli.console import state

__all__ = ["doctor"]

_PACKAGES = {
    "torch": "quantizing: pip install 'cat-ptq[torch]'",
    "neural-compressor": "recipes and autotune: pip install 'cat-ptq[inc]'",
    "apache-tvm": "compiling and running: pip install 'cat-ptq[tvm]'",
    "apache-tvm-ffi": "compiling and running: pip install 'cat-ptq[tvm]'",
    "matplotlib": "the demo's chart: pip install 'cat-ptq[report]'",
    "pillow": "image files as data: pip install pillow",
    "timm": "--model timm:NAME: pip install timm",
    "torchvision": "--model torchvision:NAME: pip install torchvision",
    "transformers": "--model hf:FOLDER: pip install transformers",
    "tensorboard": "--tensorboard: pip install tensorboard",
    "tqdm": "Neural Compressor's GPTQ: pip install tqdm",
}
_PAIRS = {
    "0.27": ("0.1.14.post0", "0.1.14.post1"),
}
"""TVM's releases and the releases of apache-tvm-ffi that they work with; pip may choose another."""
_PINS = "pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'"
_TORCH = (2, 13)  # the newest release that the tests have run with
_NEEDED = ("torch", "neural-compressor", "apache-tvm", "apache-tvm-ffi")
_OK, _OPTIONAL, _MISSING = "ok", "optional", "missing"


def _packages() -> list[dict[str, str]]:
    found = []
    for name, hint in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
            if name == "torch" and _number(version) > _TORCH:
                version = f"{version}, not tested with this release ({_TORCH[0]}.{_TORCH[1]} is)"
            found.append({"part": name, "state": _OK, "found": version, "hint": ""})
        except importlib.metadata.PackageNotFoundError:
            rank = _MISSING if name in _NEEDED else _OPTIONAL
            found.append({"part": name, "state": rank, "found": "not installed", "hint": hint})
    return found


def _number(version: str) -> tuple[int, ...]:
    """Major and minor release."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _host() -> dict[str, str]:
    """Whether the installed Neural Compressor is a supported one, and what it can do."""
    from cat_plugin.hosts.versions import RELEASES

    try:
        version = importlib.metadata.version("neural-compressor")
    except importlib.metadata.PackageNotFoundError:
        return _part("recipe host", _MISSING, "no Neural Compressor", _PACKAGES["neural-compressor"])
    # The releases between those that are listed share their interfaces.
    like = [r for r in RELEASES if _number(r.version) <= _number(version)]
    if (
        not like
        or _number(version) > _number(RELEASES[-1].version)
        or _number(version)[0] != _number(like[-1].version)[0]
    ):
        spans = f"{RELEASES[0].version} to {RELEASES[-1].version}"
        hint = "pip install 'neural-compressor[pt]>=3.9,<3.11'"
        return _part(
            "recipe host", _MISSING, f"Neural Compressor {version} is not tested ({spans} are)", hint
        )
    release = like[-1]
    can = {
        "YAML recipes": release.yaml,
        "2.x Python API": release.python2,
        "3.x torch API": release.torch3,
        "3.x static int8": release.static3,
    }
    return _part("recipe host", _OK, ", ".join(name for name, able in can.items() if able))


def _part(name: str, rank: str, found: str, hint: str = "") -> dict[str, str]:
    return {"part": name, "state": rank, "found": found, "hint": hint}


def _processor() -> dict[str, str]:
    from tvm_backend.processor import cpu_features

    features = cpu_features()
    if features is None:
        return _part("processor", _OPTIONAL, f"{platform.machine()}, features unknown")
    known = (
        "avx2",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx_vnni",
        "avx_vnni_int8",
        "amx_int8",
        "asimddp",
        "i8mm",
    )
    has = [name for name in known if name in features]
    return _part("processor", _OK, f"{platform.machine()}: {', '.join(has) or 'no vector integers'}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> list[dict[str, str]]:
    """Whether TVM's two packages fit each other, and what links."""
    from cat_plugin.errors import CompileError
    from tvm_backend import linker

    tvm, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    parts = []
    if tvm is not None and ffi is not None:
        fitting = _PAIRS.get(".".join(tvm.split(".")[:2]))
        if fitting is None:
            parts.append(_part("TVM", _OPTIONAL, f"{tvm} is not tested ({', '.join(_PAIRS)} are)", _PINS))
        elif ffi not in fitting:
            parts.append(_part("TVM", _MISSING, f"{tvm} does not work with apache-tvm-ffi {ffi}", _PINS))
    try:
        parts.append(_part("linker", _OK, " ".join(linker.find())))
    except CompileError as error:
        parts.append(_part("linker", _MISSING, "no C++ compiler", str(error).partition("; ")[2]))
    return parts


def _imported() -> list[dict[str, str]]:
    """Whether what is installed can be imported, and for which processors TVM compiles."""
    return [*_tvm(), *(_import(name) for name in ("torch", "neural_compressor.torch", "neural_compressor"))]


def _import(name: str) -> dict[str, str]:
    try:
        if importlib.util.find_spec(name) is None:
            return _part(f"import {name}", _OPTIONAL, "not there", "")
        importlib.import_module(name)
    except Exception as error:  # whatever an installation that is broken raises
        return _part(f"import {name}", _OPTIONAL, f"{type(error).__name__}: {error}", "")
    return _part(f"import {name}", _OK, "yes")


def _tvm() -> list[dict[str, str]]:
    """Whether TVM can be imported, and for which processors it would compile."""
    if importlib.util.find_spec("tvm") is None:
        return []
    try:
        from tvm_backend.runtime import import_tvm

        import_tvm()  # without torch, which takes three quarters of the time
        from tvm_backend.target import PORTABLE, native
    except Exception as error:
        return [_part("TVM", _MISSING, f"cannot be imported: {error}", _PINS)]
    return [
        _part("target native", _OK, native()["mcpu"]),
        _part("target portable", _OK, ", ".join(PORTABLE)),
    ]


def _gpu() -> dict[str, str]:
    """Whether NVIDIA's driver answers; nothing of CUDA is imported for it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _part("GPU", _OPTIONAL, "no NVIDIA driver", "compiled CUDA libraries run where the driver is")
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return _part("GPU", _OPTIONAL, "the NVIDIA driver finds no device", "check nvidia-smi")
    if shutil.which("nvcc"):
        return _part("GPU", _OK, f"{count.value} NVIDIA device(s), nvcc")
    return _part(
        "GPU", _OK, f"{count.value} NVIDIA device(s), no nvcc", "nvcc compiles for CUDA ahead of time"
    )


def doctor(
    imports: Annotated[
        bool,
        typer.Option(
            "--imports",
            help="Import PyTorch, TVM and Neural Compressor as well, for an installation that looks right and does not work.",
        ),
    ] = False,
) -> None:
    """Say which parts are installed and fit together, and what to install for the rest."""
    parts = [
        _part("python", _OK, platform.python_version()),
        *_packages(),
        _host(),
        _processor(),
        *_compiler(),
        *(_imported() if imports else ()),
        _gpu(),
    ]
    values: dict[str, Any] = {"ok": all(part["state"] != _MISSING for part in parts), "parts": parts}

    def table() -> Table:
        shown = Table(box=None, caption=_verdict(parts), caption_justify="left")
        for heading in ("", "part", "found", "to get it"):
            shown.add_column(heading)
        marks = {_OK: "[green]\N{CHECK MARK}[/green]", _OPTIONAL: "[dim]-[/dim]", _MISSING: "[red]x[/red]"}
        for part in parts:
            shown.add_row(marks[part["state"]], part["part"], part["found"], part["hint"].replace("[", "\\["))
        return shown

    state.report(values, table, "parts")


def _verdict(parts: list[dict[str, str]]) -> str:
    missing = [part["part"] for part in parts if part["state"] == _MISSING]
    return f"missing: {', '.join(missing)}" if missing else "everything that is needed is here"
