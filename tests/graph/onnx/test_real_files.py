"""Files that people use: PP-OCR's three networks and Magika, from the packages that hold them, where these are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import cat_plugin

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FILES = {
    "rapidocr_onnxruntime": ("models/*.onnx", torch.float32, (3, 64, 64)),
    "magika": ("models/standard_v*/model.onnx", torch.int32, (2048,)),
}


@pytest.mark.parametrize("package", FILES)
def test_it_is_read_and_exported_for_any_batch(package):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package}, which holds the files, is not installed")
    pattern, dtype, shape = FILES[package]
    paths = sorted(Path(spec.origin).parent.glob(pattern))
    assert paths
    for path in paths:
        module = cat_plugin.load_onnx(path)
        x = torch.rand(5, *shape).mul(1 if dtype.is_floating_point else 256).to(dtype)
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: batch},), strict=False).module()
        for rows in (1, 5):
            with torch.no_grad():
                assert torch.allclose(program(x[:rows]), module(x[:rows]), atol=1e-5)
