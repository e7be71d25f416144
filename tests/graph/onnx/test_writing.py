"""Export to ONNX: the module's numbers in ONNX Runtime and OpenVINO, standard types, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import cat_plugin
from cat_plugin.errors import CATTypeError, CATValueError, ExportError
from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import GroupedNet, SmallResNet, Uneven, randomise, small_inputs
from tests.zoo import ZOO

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cat_plugin.graph.onnx.runtimes import runtime_notes  # noqa: E402
from cat_plugin.graph.onnx.sessions import session_of  # noqa: E402
from cat_plugin.graph.onnx.writing import to_onnx  # noqa: E402

SHAPES = {SmallResNet: (64, 3, 12, 12), GroupedNet: (64, 4, 8, 8), Uneven: (64, 3, 6, 6)}


def corrected(make, **options):
    x, network = small_inputs(*SHAPES[make]), randomise(make())
    module = quantize(network, QuantSpec(**{"preset": "fast", "batch_size": 8, **options}), x)[0]
    return cat_plugin.correct(module, network, [x]), x


def agrees(result, expected):
    """A value half way between two integers may fall to either side, and moves one image's logits a little."""
    error = np.abs(result - expected).max(axis=1)
    assert (error > 1e-4).mean() < 0.1
    assert error.max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("make", [SmallResNet, GroupedNet, Uneven])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2), (3, 6)])
def test_onnx_runtime_gives_the_modules_logits(tmp_path, make, w_bits, a_bits):
    module, x = corrected(make, w_bits=w_bits, a_bits=a_bits)
    path = cat_plugin.export_onnx(module, tmp_path / "model.onnx", x)
    session = session_of(str(path), optimized=False)
    for rows in (1, 64):
        with torch.no_grad():
            expected = module(x[:rows]).numpy()
        agrees(session.run(None, {session.get_inputs()[0].name: x[:rows].numpy()})[0], expected)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_its_optimizations_are_survived(tmp_path, bits):
    module, x = corrected(SmallResNet, w_bits=bits, a_bits=bits)
    path = cat_plugin.export_onnx(module, tmp_path / "model.onnx", x)
    session = session_of(str(path))
    with torch.no_grad():
        expected = module(x).numpy()
    result = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    if bits < 8:
        # Biases stand behind layers of few bits, where they are not rounded: 3 % off when they stand inside.
        agrees(result, expected)
    else:
        # Its integer kernels requantize with rounding of their own.
        assert np.abs(result - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 4)])
def test_openvino_gives_the_modules_logits(tmp_path, w_bits, a_bits):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    module, x = corrected(GroupedNet, w_bits=w_bits, a_bits=a_bits)
    path = cat_plugin.export_onnx(module, tmp_path / "model.onnx", x, runtime="openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        agrees(np.asarray(compiled(x.numpy())[0]), module(x).numpy())


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (6, 8), (6, 6)])
def test_openvinos_integer_kernels_round_once_more(tmp_path, w_bits, a_bits):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    module, x = corrected(SmallResNet, w_bits=w_bits, a_bits=a_bits)
    path = cat_plugin.export_onnx(module, tmp_path / "model.onnx", x, runtime="openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = module(x).numpy()
    assert np.abs(np.asarray(compiled(x.numpy())[0]) - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("bits", "opset", "kind"), [(8, 21, "INT8"), (4, 21, "INT4"), (2, 21, "INT4"), (2, 25, "INT2")]
)
def test_weights_are_stored_in_the_narrowest_type(bits, opset, kind):
    module, x = corrected(SmallResNet, w_bits=bits, a_bits=8)
    model = to_onnx(export_program(module, x), opset)
    kinds = {
        onnx.TensorProto.DataType.Name(each.data_type)
        for each in model.graph.initializer
        if each.name.endswith("_integers") and len(each.dims) == 4
    }
    assert kind in kinds
    axes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.attribute]
    assert len(axes) >= 5  # per channel
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


class MovedBehindRounding(nn.Module):
    """A quantized tensor is moved before something computes in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("prototypes", torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(self.conv(x).mean((2, 3)).unsqueeze(1) - self.prototypes).square().sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_default_optimizations_load_a_file_in_which_rounded_values_are_moved(symmetric):
    """ONNX Runtime 1.32 cannot load signed bytes there; symmetric ones stay signed, as TensorRT asks."""
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(w_bits=8, a_bits=8, preset="fast", num_samples=32, symmetric_activations=symmetric)
    torch.manual_seed(1)  # with 0 a mean lies half way between two levels
    module, _ = quantize(MovedBehindRounding().eval(), spec, x.split(16))
    model = to_onnx(export_program(module, x[:2]))
    kinds = {each.data_type for each in model.graph.initializer if each.name.startswith("zero_point")}
    if symmetric:
        assert onnx.TensorProto.UINT8 not in kinds
        return
    found = session_of(model).run(None, {"x": x[:5].numpy()})[0]
    with torch.no_grad():
        assert np.allclose(found, module(x[:5]).numpy(), rtol=1e-4)


def test_two_bits_in_their_own_type_compute_the_same(tmp_path):
    module, x = corrected(GroupedNet, w_bits=2, a_bits=2)
    program = export_program(module, x)
    results = [
        session_of(to_onnx(program, opset), optimized=False).run(None, {"x": x.numpy()})[0]
        for opset in (21, 25)
    ]
    assert np.array_equal(*results)


def test_what_a_runtime_cannot_take_is_said_before(tmp_path, caplog):
    module, x = corrected(GroupedNet, w_bits=2, a_bits=4)
    path = tmp_path / "model.onnx"
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(ExportError, match="2-bit types"):
            cat_plugin.export_onnx(module, path, x, opset=25, runtime=runtime)
    assert not path.exists()
    cat_plugin.export_onnx(module, path, x, runtime="onnxruntime")
    assert "4 bits or fewer" in caplog.text
    with pytest.raises(CATValueError, match="runtime is 'tensorflow'"):
        cat_plugin.export_onnx(module, path, x, runtime="tensorflow")
    with pytest.raises(CATValueError, match="opset is 13"):
        cat_plugin.export_onnx(module, path, x, opset=13)


class UnevenZeroPoints(nn.Module):
    """A convolution whose 8-bit weights have zero points that differ by channel."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator))
        self.register_buffer("scales", torch.rand(6, generator=generator) / 50 + 0.01)
        self.register_buffer("zero_points", torch.arange(6) - 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        channels = (self.scales, self.zero_points, 0, -128, 127, torch.int8)
        return nn.functional.conv2d(
            x, ops.dequantize_per_channel(ops.quantize_per_channel(self.weight, *channels), *channels)
        )


def test_zero_points_by_channel_are_told_of():
    import torch.ao.quantization.fx._decomposed  # noqa: F401 - registers the operations

    module, x = UnevenZeroPoints(), small_inputs(4, 4, 8, 8)
    program = export_program(module, x)
    (note,) = runtime_notes(program)
    assert "symmetric_weights=True" in note.text
    result = session_of(to_onnx(program), optimized=False).run(None, {"x": x.numpy()})[0]
    assert np.allclose(result, module(x).detach().numpy(), atol=1e-4)


def test_a_bundle_is_exported_as_its_module(tmp_path):
    module, x = corrected(GroupedNet, w_bits=4, a_bits=8)
    bundle = cat_plugin.export_bundle(module, x, tmp_path / "bundle")
    one = cat_plugin.export_onnx(module, tmp_path / "one.onnx", x)
    two = cat_plugin.export_onnx(bundle, tmp_path / "two.onnx")
    results = [session_of(str(path)).run(None, {"x": x.numpy()})[0] for path in (one, two)]
    assert np.array_equal(*results)


def test_arguments_that_cannot_be_used(tmp_path):
    with pytest.raises(CATTypeError, match="the model is a int"):
        cat_plugin.export_onnx(3, tmp_path / "m.onnx")
    with pytest.raises(CATValueError, match="example_inputs"):
        cat_plugin.export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="cannot write an ONNX file"):
        cat_plugin.export_onnx(nn.Linear(3, 3), tmp_path / "no" / "m.onnx", torch.zeros(2, 3))


def test_an_operation_without_counterpart_is_named(tmp_path):
    class Fancy(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match=r"bessel_j0.* in .*\(Fancy\)"):
        cat_plugin.export_onnx(
            nn.Sequential(nn.Linear(3, 3), Fancy()), tmp_path / "m.onnx", torch.zeros(2, 3)
        )
    assert not list(tmp_path.iterdir())


class Floats(nn.Module):
    """Operations that stand between quantized layers in ordinary networks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.prelu, self.batch = nn.PReLU(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.batch(self.prelu(self.group(x)))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        x = tokens.transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
        a, b = torch.rsub(x, 1.0, alpha=0.5).chunk(2, 1)
        x = torch.cat([nn.functional.selu(a), nn.functional.gelu(b) / 3 - 2 * a], 1)
        x = self.up(nn.functional.avg_pool2d(nn.functional.pad(x, (1, 0, 0, 1)), 3, 1, 1))
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = torch.where(x > 0, x.clamp(max=3), nn.functional.softplus(x)).pow(2)
        return x[:, :, ::2, 1:].amax((2, 3)) + torch.logsumexp(x, (2, 3)) + x.std((2, 3))


def test_float_operations_and_what_has_to_be_decomposed(tmp_path):
    torch.manual_seed(0)
    module, x = Floats().eval(), small_inputs(5, 8, 4, 4)
    path = cat_plugin.export_onnx(module, tmp_path / "m.onnx", x)
    session = session_of(str(path))
    for rows in (1, 5):
        with torch.no_grad():
            expected = module(x[:rows]).numpy()
        assert np.allclose(session.run(None, {"x": x[:rows].numpy()})[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_only": True, "weight_groups": 8},
        {"a_granularity": "token", "a_bits": 4},
        {"attention_bits": 4, "smoothing": "searched"},
    ],
)
def test_grids_of_groups_of_tokens_and_of_softmax_are_written(tmp_path, options):
    network = ZOO["encoder"]
    x = network.inputs(8)
    module, _ = quantize(network.build(), QuantSpec(preset="fast", **options), x)
    path = cat_plugin.export_onnx(module, tmp_path / "model.onnx", x)
    session = session_of(str(path), optimized=False)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        agrees(found, module(x).numpy())


class Heads(nn.Module):
    """Two results, named or not."""

    def __init__(self, named):
        super().__init__()
        self.body, self.named = nn.Linear(6, 4), named

    def forward(self, x):
        logits = self.body(x)
        return {"logits": logits, "boxes": {"size": logits.exp()}} if self.named else (logits, logits.exp())


@pytest.mark.parametrize(
    ("named", "names"), [(True, ["logits", "boxes.size"]), (False, ["output_0", "output_1"])]
)
def test_outputs_have_the_names_of_what_the_model_returns(named, names):
    program = export_program(Heads(named).eval(), torch.randn(4, 6))
    assert [output.name for output in to_onnx(program).graph.output] == names
