"""What stands in for PyTorch's private parts where a release lacks them, and that they are used in one file only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_plugin import torch_compat

_ROOT = Path(torch_compat.__file__).parent
# Results of every operation on ties, clipped values, both signs and each dtype, as they are or with torch's module hidden.
_SCRIPT = """
import sys
import torch
hidden = sys.argv[1] == "hidden"
if hidden:
    sys.modules["torch.ao.quantization.fx._decomposed"] = None
from cat_plugin.torch_compat import register_quantized_decomposed
register_quantized_decomposed()
register_quantized_decomposed()  # a second time changes nothing
assert ("torch.ao.quantization.fx._decomposed" in sys.modules and not hidden) or hidden
qd = torch.ops.quantized_decomposed
g = torch.Generator().manual_seed(0)
out = {}
for i, (low, high, dtype, zero) in enumerate(
    [(0, 255, torch.uint8, 128), (0, 3, torch.uint8, 1), (-2, 1, torch.int8, 0), (-8, 7, torch.int8, -3),
     (-32768, 32767, torch.int16, 5)]
):
    scale = 0.0371 * (i + 1)
    x = torch.randn(6, 7, 5, generator=g) * scale * (high - low)
    x.view(-1)[::3] = ((x.view(-1)[::3] / scale).round() + 0.5) * scale
    grid = (low, high, dtype)
    q = out[f"q{i}"] = qd.quantize_per_tensor(x, scale, zero, *grid)
    out[f"d{i}"] = qd.dequantize_per_tensor(q, scale, zero, *grid)
    out[f"w{i}"] = qd.dequantize_per_tensor(q, scale, zero, *grid, out_dtype=torch.float16)
    out[f"h{i}"] = qd.quantize_per_tensor(x.bfloat16(), scale, zero, *grid)
    s, z = torch.tensor(scale), torch.tensor(zero)
    out[f"qt{i}"] = qd.quantize_per_tensor.tensor(x, s, z, *grid)
    out[f"dt{i}"] = qd.dequantize_per_tensor.tensor(q, s, z, *grid)
    for axis in range(3):
        n = x.shape[axis]
        scales, zeros = torch.rand(n, generator=g) * scale + 1e-3, torch.randint(low, high + 1, (n,), generator=g)
        q = out[f"cq{i}{axis}"] = qd.quantize_per_channel(x, scales, zeros, axis, *grid)
        out[f"cd{i}{axis}"] = qd.dequantize_per_channel(q, scales, zeros, axis, *grid)
        out[f"cn{i}{axis}"] = qd.dequantize_per_channel(q, scales, None, axis, *grid)
    if dtype is not torch.int16:
        scales = torch.rand(6, 7, 1, generator=g) * scale + 1e-3
        zeros = torch.randint(low, high + 1, (6, 7, 1), generator=g)
        q = out[f"tq{i}"] = qd.quantize_per_token(x, scales, zeros, *grid)
        out[f"td{i}"] = qd.dequantize_per_token(q, scales, zeros, *grid, torch.float32)
        q = torch.randint(low, high + 1, (8, 12), generator=g).to(dtype)
        scales, zeros = torch.rand(8, 3, generator=g), torch.randint(low, high + 1, (8, 3), generator=g)
        out[f"gd{i}"] = qd.dequantize_per_channel_group(q, scales, zeros, *grid, 4, torch.float32)
        out[f"gn{i}"] = qd.dequantize_per_channel_group(q, scales, None, *grid, 4, torch.float32)

class Net(torch.nn.Module):
    def forward(self, x):
        q = qd.quantize_per_tensor(x, 0.1, 3, 0, 15, torch.uint8)
        return qd.dequantize_per_tensor(q, 0.1, 3, 0, 15, torch.uint8)

batch = torch.export.Dim("batch", min=1)
program = torch.export.export(Net(), (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
out["program"] = program.module()(torch.arange(12.0).view(4, 3) / 7)
torch.export.save(program, sys.argv[2] + ".pt2")
from safetensors.torch import save_file
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[2])
"""


def test_the_stand_in_gives_the_same_bits_as_torch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = {}
    for mode in ("shown", "hidden"):
        path = tmp_path / mode
        subprocess.run([sys.executable, "-c", _SCRIPT, mode, str(path)], check=True)
        found[mode] = load_file(path)
    assert found["shown"].keys() == found["hidden"].keys()
    for name, value in found["shown"].items():
        assert value.dtype == found["hidden"][name].dtype, name
        assert torch.equal(value, found["hidden"][name]), name
    torch_compat.register_quantized_decomposed()
    program = torch.export.load(tmp_path / "hidden.pt2")  # written with the one, read with the other
    assert torch.equal(program.module()(torch.arange(12.0).view(4, 3) / 7), found["shown"]["program"])


def test_a_model_is_quantized_saved_and_exported_where_the_module_is_gone(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch.ao.quantization.fx._decomposed"] = None
import torch, cat_plugin
from cat_plugin.ptq import QuantSpec, quantize
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)).eval()
x = torch.randn(32, 3, 8, 8)
quantized, _ = quantize(model, QuantSpec(preset="fast"), x)
corrected = cat_plugin.correct(quantized, model, x)
path = cat_plugin.export_bundle(corrected, x[:2], {str(tmp_path / "bundle")!r})
from cat_plugin.graph.bundle import read_bundle
assert torch.equal(read_bundle(path).program().module()(x), corrected(x))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch_compat._quantize_per_tensor(x.double(), 0.1, 0, 0, 3, torch.uint8), "float64"),
        (lambda x: torch_compat._quantize_per_tensor(x, 0.1, 0, -1, 3, torch.uint8), "do not fit"),
        (lambda x: torch_compat._dequantize_per_tensor(x, 0.1, 0, 0, 3, torch.uint8), "float32"),
    ],
)
def test_what_the_stand_in_refuses(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.zeros(3))


def _private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and any(
        part == "ao" or re.fullmatch(r"_(?!_|check$)\w+", part) for part in parts[1:]
    )


def _names(node: ast.AST) -> list[str]:
    """Full names that an import or an attribute reads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [ast.unparse(node)] if isinstance(node, ast.Attribute) else []


def test_private_parts_of_torch_are_named_in_one_file_only() -> None:
    sources = [
        path for folder in ("cat_plugin", "tvm_backend") for path in (_ROOT.parent / folder).rglob("*.py")
    ]
    assert len({path.relative_to(_ROOT.parent).parts[0] for path in sources}) == 2
    found = {
        f"{path.relative_to(_ROOT.parent)}: {name}"
        for path in sorted(sources)
        if path.name != "torch_compat.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _names(node)
        if _private(name) or (name.endswith("._opoverload"))
    }
    assert not found


def test_the_stand_in_has_every_operation_that_the_package_calls() -> None:
    defined = {schema.partition("(")[0].partition(".")[0] for schema in torch_compat._SCHEMAS}
    called = {
        name
        for path in _ROOT.rglob("*.py")
        for name in re.findall(
            r"\b_?(?:qd|quantized_decomposed)\.((?:de)?quantize_\w+)\.(?:default|tensor)\b",
            path.read_text(encoding="utf-8"),
        )
    }
    assert called
    assert called <= defined
