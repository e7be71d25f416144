"""``correct``: what it runs, what it appends, what it refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.correction import CorrectedModule, correct
from cat_plugin.errors import CalibrationError, CATTypeError


class Net(torch.nn.Module):
    """Features to logits, with a layer whose output depends on the mode."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(classes, 7, generator=generator))
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x @ self.weight.T)


def seeded() -> ClusterAffine:
    """The paper's estimator with the randomness of k-means taken out."""
    return ClusterAffine.paper().set_params(random_state=0)


@pytest.fixture
def pair() -> tuple[Net, Net]:
    """A reference and what a coarse rounding of its weights makes of it."""
    reference, quantized = Net(), Net()
    with torch.no_grad():
        quantized.weight.copy_(torch.round(reference.weight / 1.5) * 1.5)
    return reference, quantized


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(200, 7, generator=torch.Generator().manual_seed(1)).split(32))


def test_output_is_that_of_the_estimator(pair, batches):
    reference, quantized = pair
    corrected = correct(quantized, reference, batches, seeded())
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(2))
    z_q = x @ quantized.weight.T
    # An estimator of our own, fitted to logits computed by hand.
    calibration = torch.cat(batches)
    expected = (
        seeded()
        .fit(
            (calibration @ quantized.weight.T).detach().numpy(),
            (calibration @ reference.weight.T).detach().numpy(),
        )
        .predict(z_q.detach().numpy())
    )
    np.testing.assert_allclose(corrected(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert corrected.model is quantized
    assert isinstance(corrected.estimator, ClusterAffine)


def test_brings_logits_closer_to_the_reference(pair, batches):
    reference, quantized = pair
    corrected = correct(
        quantized, reference, batches, ClusterAffine(mode="diagonal", n_clusters=1, alpha=1.0)
    )
    x = torch.cat(batches)
    target = x @ reference.weight.T
    before = ((x @ quantized.weight.T - target) ** 2).mean()
    after = ((corrected(x) - target) ** 2).mean()
    assert after < before


def test_models_keep_mode_weights_and_gradients(pair, batches):
    reference, quantized = pair
    reference.train()
    quantized.train()
    before = reference.weight.detach().clone()
    correct(quantized, reference, batches)
    assert reference.training
    assert reference.drop.training
    assert not quantized.training
    assert reference.weight.grad is None
    assert torch.equal(reference.weight, before)


def test_dropout_of_a_model_in_training_mode_plays_no_part(pair, batches):
    reference, quantized = pair
    reference.train()
    first = correct(quantized, reference, batches)
    second = correct(quantized, reference.eval(), batches)
    x = batches[0]
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "loader"])
def test_forms_of_calibration_batches(pair, batches, form):
    reference, quantized = pair
    labels = torch.zeros(200, dtype=torch.long)
    given = {
        "tensor": batches,
        "tuple": [(x, 0) for x in batches],
        "list": [[x, 0] for x in batches],
        "loader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat(batches), labels), batch_size=32
        ),
    }[form]
    made = correct(quantized, reference, given)
    assert torch.equal(made(batches[0]), correct(quantized, reference, batches)(batches[0]))


def test_one_shot_iterator_feeds_both_models(pair, batches):
    reference, quantized = pair
    made = correct(quantized, reference, iter(batches))
    assert torch.equal(made(batches[0]), correct(quantized, reference, batches)(batches[0]))


@pytest.mark.parametrize("form", ["arrays", "one tensor", "one array", "keywords"])
def test_forms_of_calibration(pair, batches, form):
    reference, quantized = pair
    whole = torch.cat(batches)
    given = {
        "arrays": [x.numpy() for x in batches],
        "one tensor": whole,
        "one array": whole.numpy(),
        "keywords": [{"x": x} for x in batches],
    }[form]
    made = correct(quantized, reference, given, seeded())
    torch.testing.assert_close(made(whole), correct(quantized, reference, batches, seeded())(whole))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(7), "quantized|full-precision model.*shape"),
        ([torch.ones(4, 6)], r"full-precision model raised RuntimeError.*batch 0.*float32 \(4, 6\)"),
        ([torch.ones(4, 7).double()], r"raised RuntimeError.*float64 \(4, 7\)"),
        ([torch.ones(7)], r"of shape \(5,\) for calibration batch 0"),
    ],
)
def test_inputs_that_the_model_does_not_take(pair, given, message):
    with pytest.raises(CalibrationError, match=message):
        correct(*reversed(pair), given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["full-precision", "quantized"])
def test_logits_that_are_not_finite_name_model_and_batch(pair, batches, value, which):
    reference, quantized = pair
    broken = [batch.clone() for batch in batches]
    broken[3][5, 0] = value
    if which == "full-precision":
        with pytest.raises(CalibrationError, match=r"full-precision model.*batch 3.*1 of 32 rows.*row 5"):
            correct(quantized, reference, broken)
    else:
        with torch.no_grad():
            quantized.weight[2] = value
        with pytest.raises(CalibrationError, match=r"quantized model.*batch 0"):
            correct(quantized, reference, batches)


@pytest.mark.parametrize("empty", [[], iter(()), [torch.zeros(0, 7)]])
def test_empty_calibration(pair, empty):
    with pytest.raises(CalibrationError, match="no batch"):
        correct(*reversed(pair), empty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:, None], r"shape \(32, 1, 5\).*batch 0.*\(N, C\)"),
        (lambda z: z.argmax(1), r"int64 tensor of shape \(32,\)"),
        (lambda z: {"logits": z}, "returned a dict.*batch 0"),
    ],
)
def test_outputs_that_are_no_logits(pair, batches, change, message):
    reference, quantized = pair

    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return change(reference(x))

    with pytest.raises(CalibrationError, match=message):
        correct(quantized, Wrapped(), batches)


def test_models_of_different_classes(pair, batches):
    with pytest.raises(CalibrationError, match=r"\(200, 5\).*\(200, 6\)"):
        correct(pair[1], Net(classes=6), batches)


def test_changing_number_of_classes(pair):
    class Changing(torch.nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(CalibrationError, match="4 columns for calibration batch 1 and 3"):
        correct(Changing(), Changing(), [torch.ones(2, 3), torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, Net(), []), "quantized is a NoneType"),
        ((Net(), lambda x: x, []), "reference is a function"),
        ((Net(), Net(), 3), "int, which cannot be iterated"),
        ((Net(), Net(), ["x"]), "batch 0 is a str"),
        ((Net(), Net(), [()]), "batch 0 is a tuple"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(CATTypeError, match=message):
        correct(*arguments)


def test_corrected_module_only_evaluates(pair, batches):
    reference, quantized = pair
    corrected = correct(quantized.eval(), reference, batches)
    assert isinstance(corrected, CorrectedModule)
    assert not corrected.training
    assert corrected.eval() is corrected
    with pytest.raises(CATTypeError, match="training mode"):
        corrected.train()


def test_half_precision_models(pair, batches):
    reference, quantized = pair
    quantized = quantized.to(torch.bfloat16)
    corrected = correct(quantized, reference.to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches])
    assert corrected(batches[0].to(torch.bfloat16)).dtype == torch.bfloat16


def test_export_with_dynamic_batch_is_one_op(pair, batches):
    reference, quantized = pair
    corrected = correct(quantized.eval(), reference, batches, seeded())
    program = torch.export.export(
        corrected, (batches[0],), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
    )
    ops = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.cat.cluster_affine.default) == 1
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(program.module()(x), corrected(x))


def test_half_precision_is_refused_also_as_a_part_of_another_module(pair: tuple[Net, Net]) -> None:
    reference, quantized = pair
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    corrected = correct(quantized, reference, x, seeded())
    before = corrected(x)
    for convert in (
        corrected.half,
        corrected.bfloat16,
        corrected.double,
        torch.nn.Sequential(corrected).half,
    ):
        with pytest.raises(CATTypeError, match=r"cannot be converted to b?float(16|64)"):
            convert()
    assert torch.equal(corrected.to("cpu")(x), before)


def test_torch_save_gives_the_same_logits_back() -> None:
    from cat_plugin.ptq import QuantSpec, quantize

    model = torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)).eval()
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    quantized, _ = quantize(model, QuantSpec(preset="fast", num_samples=64), x)
    corrected = correct(quantized, model, x, seeded())
    stream = io.BytesIO()
    torch.save(corrected, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), corrected(x))
