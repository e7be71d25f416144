"""Graphs of all sorts: each gives what torch gives, as integers wherever it can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin.graph.op  # noqa: F401
import tvm_backend
from cat_plugin.errors import CATTypeError, CompileError, LibraryError
from tests.tvm_backend import qdq_models as models

Q = models.Quantize


class Sequence(nn.Module):
    """Conv1d, with dilation and groups, twice, then a mean over time and a linear layer."""

    def __init__(self):
        super().__init__()
        self.q1, self.q2, self.q3, self.q4 = Q(8), Q(4), Q(8), Q(8, signed=True)
        self.conv1 = models.QConv(nn.Conv1d(6, 8, 5, 2, 2), 8)
        self.conv2 = models.QConv(nn.Conv1d(8, 12, 3, padding=2, dilation=2, groups=2), 4)
        self.fc = models.QLinear(nn.Linear(12, 5), 8)

    def forward(self, x):
        x = torch.relu(self.conv1(self.q1(x)))
        x = self.q3(torch.relu(self.conv2(self.q2(x))))
        return self.fc(self.q4(x.mean(2)))


class Mobile(nn.Module):
    """Padding on two sides, depthwise, ReLU6, an inverted residual without activation, mean over the pixels."""

    def __init__(self):
        super().__init__()
        self.q = nn.ModuleList([Q(8, True), Q(8), Q(4), Q(8, True), Q(8, True), Q(8), Q(8, True), Q(8)])
        self.stem = models.QConv(nn.Conv2d(3, 16, 3, 2), 8)
        self.depthwise = models.QConv(nn.Conv2d(16, 16, 3, 1, 1, groups=16), 8)
        self.project = models.QConv(nn.Conv2d(16, 16, 1), 4)
        self.fc = models.QLinear(nn.Linear(16, 7), 8)

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        x = nn.functional.relu6(self.stem(self.q[0](x)))
        y = nn.functional.relu6(self.depthwise(self.q[1](x)))
        y = self.q[3](self.project(self.q[2](y))) + self.q[5](x)
        y = self.q[4](y).mean((-2, -1))
        return self.fc(self.q[6](y))


class Inception(nn.Module):
    """Max pooling, two branches and their concatenation, average pooling, flattening of more than one pixel."""

    def __init__(self):
        super().__init__()
        self.q = nn.ModuleList([Q(8, True), Q(8), Q(8), Q(4), Q(8), Q(8), Q(8)])
        self.stem = models.QConv(nn.Conv2d(3, 8, 3, 1, 1), 8)
        self.left = models.QConv(nn.Conv2d(8, 8, 1), 4)
        self.right = models.QConv(nn.Conv2d(8, 16, 3, 1, 1, bias=False), 4)
        self.fc = models.QLinear(nn.Linear(24 * 4, 6), 8)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.q[1](torch.relu(self.stem(self.q[0](x)))), 3, 2, 1)
        low = self.q[3](x)
        x = torch.cat([self.q[2](torch.relu(self.left(low))), self.q[4](torch.relu(self.right(low)))], 1)
        x = nn.functional.avg_pool2d(self.q[5](x), 2)
        return self.fc(self.q[6](x.flatten(1)))


class Tokens(nn.Module):
    """A transformer's feed-forward part: linear layers on tokens, normalization and GELU in float."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q = nn.ModuleList([Q(8, True), Q(8, True), Q(8, True)])
        self.up, self.down = models.QLinear(nn.Linear(16, 32), 4), models.QLinear(nn.Linear(32, 16), 4)
        self.fc = models.QLinear(nn.Linear(16, 5), 8)

    def forward(self, x):
        y = self.up(self.q[0](self.norm(x)))
        x = x + self.down(self.q[1](nn.functional.gelu(y)))
        return self.fc(self.q[2](x.mean(1)))


class Odd(nn.Module):
    """A float operator between two quantized layers, an asymmetric weight, a weight with one scale."""

    def __init__(self):
        super().__init__()
        self.q1, self.q2 = Q(8, True), Q(8, True)
        self.conv = models.QConv(nn.Conv2d(3, 8, 3, 1, 1), 4)
        self.conv.weight.zero_point += 1
        self.fc = models.QLinear(nn.Linear(8, 5), 8)
        self.fc.weight = models.QWeight(torch.randn(5, 8), 8, per_tensor=True)

    def forward(self, x):
        x = self.conv(self.q1(x))
        x = x * torch.sigmoid(x)
        return torch.softmax(self.fc(self.q2(x.mean((2, 3)))), -1)


SHAPES = {Sequence: (6, 33), Mobile: (3, 17, 17), Inception: (3, 8, 8), Tokens: (7, 16), Odd: (3, 9, 9)}
KINDS = {
    Sequence: {"quantize", "conv", "pool", "linear"},
    Mobile: {"quantize", "conv", "pool", "linear"},
    Inception: {"quantize", "conv", "pool", "concat", "linear"},
    Tokens: {"quantize", "linear", "rows"},
    Odd: {"quantize", "conv", "linear", "rows"},
}
FLOAT = {
    Sequence: set(),
    Mobile: set(),
    Inception: set(),
    Tokens: {"nn.layer_norm", "nn.gelu", "add", "mean"},
    Odd: {"sigmoid", "multiply", "mean", "nn.softmax"},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_equals_torch(kind, dynamic, tmp_path):
    torch.manual_seed(3)
    model = kind()
    x = torch.randn(4, *SHAPES[kind])
    report = tvm_backend.compile(models.exported(model, x, dynamic), out=tmp_path / "m.so", cache=False)
    actual = tvm_backend.load(report.path)(x).numpy()
    wanted = model(x).detach().numpy()
    error = np.abs(actual - wanted).max(1)
    assert error.min() < 1e-5
    assert error.max() < 0.03 * np.abs(wanted).max()
    assert {kernel.kind for kernel in report.kernels} == KINDS[kind]
    assert (
        set(report.float_ops) - {"subtract", "divide", "variance", "power", "sqrt", "erf", "exp"}
        == FLOAT[kind]
    )


def test_fixed_batch_refuses_another(tmp_path):

    x = torch.randn(4, 6, 33)
    program = models.exported(Sequence(), x, dynamic=False)
    report = tvm_backend.compile(program, out=tmp_path / "m.so", cache=False)
    with pytest.raises(LibraryError, match=r"takes \(4, 6, 33\)"):
        tvm_backend.load(report.path)(x[:2])
    with pytest.raises(CompileError, match="batch size is fixed"):
        tvm_backend.compile(program, out=tmp_path / "n.so", batch_sizes=(2,))


def test_a_library_that_was_replaced_is_loaded_anew(tmp_path):
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.QLinear(nn.Linear(6, 3), 8)
        model = nn.Sequential(Q(8, True), model)
        program = models.exported(model, torch.linspace(-1, 1, 12).reshape(2, 6))
        tvm_backend.compile(program, out=tmp_path / "m.so", cache=False)
        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        outputs.append((tvm_backend.load(tmp_path / "m.so")(x), model(x).detach()))
    for actual, wanted in outputs:
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


def test_the_cache_gives_the_same_library(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = nn.Sequential(Q(8, True), models.QLinear(nn.Linear(6, 3), 8))
    program = models.exported(model, torch.randn(4, 6))
    reports = [tvm_backend.compile(program, out=tmp_path / name) for name in ("a.so", "b.so")]
    assert [report.cached for report in reports] == [False, True]
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()
    assert reports[0].kernels == reports[1].kernels
    (entry,) = (tmp_path / "cache" / "tvm").iterdir()
    (entry / "0.so").write_bytes(b"damaged")
    assert not tvm_backend.compile(program, out=tmp_path / "c.so").cached
    assert not tvm_backend.compile(program, out=tmp_path / "d.so", batch_sizes=(2,)).cached


def test_a_portable_library_carries_variants(tmp_path, monkeypatch):
    from tvm_backend import variants

    torch.manual_seed(0)
    model = models.QResNet(4, "pad", width=8)
    x = torch.randn(2, 3, 8, 8)
    report = tvm_backend.compile(models.exported(model, x), "portable", tmp_path / "m.so", cache=False)
    names = ["amx_int8", "avx512_vnni", "avx512bw", "avx_vnni", "avx2", "baseline"]
    assert [v["variant"] for v in report.variants] == names
    assert [v["file"] for v in report.variants] == ["m.so", *(f"m.{name}.so" for name in names[1:])]
    features = variants.cpu_features()
    if features is None or "avx2" not in features:
        pytest.skip("this processor has no AVX2")
    chosen = {}
    for hidden in range(len(names)):
        without = names[:hidden]
        monkeypatch.setattr(variants, "cpu_features", lambda hidden=without: features - set(hidden))
        library = tvm_backend.load(report.path)
        chosen[library.variant["variant"]] = library(x)
    assert {"avx2", "baseline"} <= set(chosen)
    results = list(chosen.values())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=0)


def test_a_library_for_amx_needs_amx(tmp_path, monkeypatch):
    from tvm_backend import variants

    model = models.QResNet(8, "pad", width=16)
    program = models.exported(model, torch.randn(2, 3, 8, 8))
    report = tvm_backend.compile(program, "sapphirerapids", tmp_path / "m.so", cache=False)
    assert report.variants[0]["amx"]
    assert {"amx_int8", "avx512_vnni"} <= {kernel.variant for kernel in report.kernels}
    everything = frozenset(report.variants[0]["features"])
    monkeypatch.setattr(variants, "cpu_features", lambda: everything - {"amx_int8", "amx_tile"})
    with pytest.raises(LibraryError, match=r"sapphirerapids needs amx_int8, amx_tile\."):
        tvm_backend.load(report.path)
    monkeypatch.setattr(variants, "cpu_features", lambda: everything)
    monkeypatch.setattr(variants, "permit_amx", lambda: False)
    with pytest.raises(LibraryError, match=r"AMX tiles, which the operating system refuses"):
        tvm_backend.load(report.path)


def test_native_leaves_out_what_is_withheld(monkeypatch):
    from tvm_backend import target

    spelled = target.FEATURES["x86_64"]
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(target.codegen, "llvm_get_system_cpu", lambda: "sapphirerapids")
    monkeypatch.setattr(target, "permit_amx", lambda: False)
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset(spelled.values()))
    assert target.native() == {"kind": "llvm", "mcpu": "sapphirerapids", "mattr": ["-amx-tile", "-amx-int8"]}
    monkeypatch.setattr(target, "permit_amx", lambda: True)
    assert target.native() == {"kind": "llvm", "mcpu": "sapphirerapids"}
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset(spelled.values()) - {"avx512_vnni"})
    assert target.native()["mattr"] == ["-avx512vnni"]


def test_a_graph_of_torchao(tmp_path):
    """What Neural Compressor 3.9 and later hand out: weights are quantized in the graph."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,), dynamic_shapes=shapes).module(), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    program = torch.export.export(converted, (x,), dynamic_shapes=shapes)
    report = tvm_backend.compile(program, out=tmp_path / "m.so", cache=False)
    kinds = [kernel.kind for kernel in report.kernels]
    assert kinds.count("conv") == 2
    assert kinds.count("linear") == 1
    wanted = converted(x).detach().numpy()
    np.testing.assert_allclose(
        tvm_backend.load(report.path)(x).numpy(), wanted, atol=0.02 * np.abs(wanted).max()
    )


def test_a_graph_without_quantization():
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    with pytest.raises(CompileError, match="no convolution or linear layer with quantized"):
        tvm_backend.compile(program)


def test_an_operator_that_cannot_be_imported():
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.forward = lambda x: torch.ops.aten._fft_c2r(torch.complex(x, x), [1], 0, 4)

        def forward(self, x):
            return self.inner(x)

    program = torch.export.export(Unusual(), (torch.zeros(2, 3),))
    with pytest.raises(CompileError, match=r"_fft_c2r.*node '.*'.*inner"):
        tvm_backend.compile(program)


@pytest.mark.parametrize("source", [nn.Linear(2, 2), 3, None])
def test_something_that_is_no_graph(source):
    with pytest.raises(CATTypeError, match="give a bundle's directory"):
        tvm_backend.compile(source)


def test_unknown_target_and_name(compiled, tmp_path):
    program = compiled[2]
    with pytest.raises(CompileError, match="target 'z80' is not known"):
        tvm_backend.compile(program, target="z80", out=tmp_path / "m.so")
    with pytest.raises(CompileError, match="does not accept the target"):
        tvm_backend.compile(program, target={"kind": "no-such-kind"}, out=tmp_path / "m.so")
    with pytest.raises(CompileError, match=r"must end in \.so"):
        tvm_backend.compile(program, out=tmp_path / "m.dll")
    assert list(tmp_path.iterdir()) == []


def test_without_a_linker(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(CompileError, match=r"apt-get install g\+\+"):
        tvm_backend.compile(compiled[2], out=tmp_path / "m.so")
    assert list(tmp_path.iterdir()) == []
