"""ONNX files on disk, and the two packages that read and run them."""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path
from typing import Any

from cat_plugin.errors import CATError, CATValueError, ExportError
from cat_plugin.files import PART, sync, write_errors

__all__ = ["need", "read_model", "write_model"]


def need(package: str) -> Any:
    """Import `onnx` or `onnxruntime`, or say how to install it.

    Raises
    ------
    CATError
        When it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CATError(
            f"ONNX files need the package {package}, which cannot be imported ({error}): pip install 'cat-ptq[onnx]'"
        ) from error


def read_model(path: str | os.PathLike[str], *, weights: bool = True) -> Any:
    """Parse an ONNX file.

    Parameters
    ----------
    path : path
        The file.
    weights : bool, default True
        Whether weights that lie in files beside it are read as well.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    CATValueError
        When there is no such file, or it is no ONNX model.
    """
    onnx = need("onnx")
    if not Path(path).is_file():
        raise CATValueError(f"no ONNX file at {path}; give the path of a .onnx file")
    try:
        model = onnx.load(os.fspath(path), load_external_data=weights)
    except Exception as error:  # protobuf's, the checker's of external data, the system's
        raise CATValueError(f"{path} cannot be read as an ONNX model: {error}; export it again") from error
    if not model.graph.node or not model.graph.output:
        raise CATValueError(
            f"{path} cannot be read as an ONNX model: it holds no nodes or no outputs; export it again"
        )
    return model


def write_model(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write an ONNX model, whole or not at all.

    Parameters
    ----------
    model : onnx.ModelProto
        What to write.
    path : path
        A file that stands there is replaced.

    Returns
    -------
    pathlib.Path
        Absolute.

    Raises
    ------
    ExportError
        When it is larger than the 2 GiB that one file can hold, or cannot be written.
    """
    final = Path(path).absolute()
    try:
        content = model.SerializeToString()
    except Exception as error:
        raise ExportError(
            f"the model cannot be written as one ONNX file: {error}; files end at 2 GiB, quantize the weights to "
            "fewer bits"
        ) from error
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}{PART}")
    with write_errors(ExportError, f"an ONNX file to {path}"):
        try:
            with part.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, final)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync(final.parent)
    return final
