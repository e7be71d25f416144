"""Random networks composed of the idioms and of ordinary layers, and what must hold for each of them.

``python -m tests.zoo.generator 2000 --compile 20`` tries 2000 networks that no earlier run has seen and compiles every
twentieth.  A failure prints the smallest network that shows it, which becomes an idiom or a test.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cat_plugin.graph.export import export_program
from cat_plugin.ptq import QuantSpec, quantize
from tests.zoo.idioms import ARITHMETIC, INDEXING, MUTATION
from tests.zoo.noise import expected_noise, worst_grid

__all__ = ["Composed", "Plan", "Step", "check", "plans"]

_SIZE, _CHANNELS = 8, 8
# Of 600 networks the worst was off by 2.1 times what the errors of its levels make at random, and its worst grid had 1.9 times the
# squared errors of the plain one.
_FACTOR, _GRID = 3.0, 3.0
# Sizes that tracing learns only afterwards, which a network that asks for them is refused for, and parts written into, which fix
# the batch for what stands beside them; which pixel is the largest around, rounding decides: by themselves they are in the zoo.
_ALONE = frozenset({"index-mask", "repeat-by-table", "unbind-mul_", "peaks"})
# Drawn anew at every call or by the batch: no function of one row, which is what the comparisons below suppose.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    **{name: made for name, made in MUTATION.items() if name not in _ALONE},
    **{name: made for name, made in ARITHMETIC.items() if not isinstance(made, type)},
    **{name: made for name, made in INDEXING.items() if name not in _ALONE},
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu-inplace": lambda y: F.relu(y, inplace=True),
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda new, _old: new,
    "add": lambda new, old: new + old,
    "add-inplace": lambda new, old: new.add_(old),
    "subtract": lambda new, old: old - new,
    "multiply": lambda new, old: new * old,
    "gate": lambda new, old: old * torch.sigmoid(new),
    "concat": lambda new, old: torch.cat([new[:, :4], old[:, 4:]], 1),
    "shuffle": lambda new, old: torch.stack([new, old], 2).flatten(1, 2)[:, :_CHANNELS],
    "squeeze": lambda new, old: old * torch.sigmoid(new.mean((2, 3), keepdim=True)),
}
LAYERS = ("conv3", "conv1", "depthwise", "grouped", "linear", "linear-transposed", "none")
NORMS = ("none", "batch", "batch-first", "layer", "group")


@dataclass(frozen=True)
class Step:
    """An idiom, a layer that brings its result back to 8 channels, normalisation, activation, and a join with the input."""

    function: str
    layer: str = "conv1"
    norm: str = "none"
    activation: str = "relu"
    join: str = "none"


@dataclass(frozen=True)
class Plan:
    """A network as data: what a failing example prints."""

    steps: tuple[Step, ...]
    head: str = "mean"
    bits: int = 8
    equalize: bool = True


def plans() -> st.SearchStrategy[Plan]:
    """Networks of one to four steps."""
    step = st.builds(
        Step,
        st.sampled_from(list(FUNCTIONS)),
        st.sampled_from(LAYERS),
        st.sampled_from(NORMS),
        st.sampled_from(list(ACTIVATIONS)),
        st.sampled_from(list(JOINS)),
    )
    heads = st.sampled_from(("mean", "flatten", "max", "tokens"))
    return st.builds(
        Plan,
        st.lists(step, min_size=1, max_size=4).map(tuple),
        heads,
        st.sampled_from((8, 4)),
        st.booleans(),
    )


class _Linear(nn.Module):
    """A linear layer over channels, on pixels as rows, or over rows of pixels on a transposed tensor."""

    def __init__(self, inputs: int, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.fc = nn.Linear(_SIZE if transposed else inputs, _SIZE if transposed else _CHANNELS)

    def forward(self, y: Tensor) -> Tensor:
        if self.transposed:
            return self.fc(y.transpose(2, 3)).transpose(2, 3)
        return self.fc(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(self, step: Step, channels: int) -> None:
        super().__init__()
        self.step = step
        makers: dict[str, Callable[[], nn.Module]] = {
            "conv3": lambda: nn.Conv2d(channels, _CHANNELS, 3, padding=1),
            "conv1": lambda: nn.Conv2d(channels, _CHANNELS, 1),
            "depthwise": lambda: nn.Conv2d(channels, _CHANNELS, 3, padding=1, groups=_CHANNELS, bias=False),
            "grouped": lambda: nn.Conv2d(channels, _CHANNELS, 3, padding=1, groups=2),
            "linear": lambda: _Linear(channels, transposed=False),
            "linear-transposed": lambda: _Linear(channels, transposed=True),
            "none": nn.Identity,
        }
        fits = channels == _CHANNELS
        self.layer = makers[step.layer if fits or step.layer in ("conv3", "conv1", "linear") else "conv1"]()
        norms: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: nn.BatchNorm2d(_CHANNELS),
            "batch-first": lambda: nn.BatchNorm2d(channels),
            "layer": lambda: nn.LayerNorm([_CHANNELS, _SIZE, _SIZE]),
            "group": lambda: nn.GroupNorm(2, _CHANNELS),
            "none": nn.Identity,
        }
        self.norm = norms[step.norm]()

    def forward(self, x: Tensor) -> Tensor:
        y = FUNCTIONS[self.step.function](x.clone() if self.step.join != "none" else x)
        if y.shape[2:] != (_SIZE, _SIZE):
            y = F.interpolate(y, size=(_SIZE, _SIZE))
        y = self.layer(self.norm(y)) if self.step.norm == "batch-first" else self.norm(self.layer(y))
        return JOINS[self.step.join](ACTIVATIONS[self.step.activation](y), x)


class Composed(nn.Module):
    """The network of a plan: (N, 3, 8, 8) images to (N, 10) logits, its weights seeded, in evaluation mode."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.head = plan.head
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, _CHANNELS, 3, padding=1)
            blocks = []
            with torch.no_grad():
                x = torch.randn(2, _CHANNELS, _SIZE, _SIZE)
                for step in plan.steps:
                    blocks.append(_Block(step, FUNCTIONS[step.function](x.clone()).shape[1]).eval())
            self.blocks = nn.Sequential(*blocks)
            self.fc = nn.Linear(_CHANNELS * (_SIZE**2 if plan.head == "flatten" else 1), 10)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                    module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                    nn.init.uniform_(module.weight, 0.6, 1.4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(x))
        if self.head == "flatten":
            return self.fc(y.flatten(1))
        if self.head == "tokens":
            return self.fc(y.flatten(2).transpose(1, 2))[:, 0]
        return self.fc(y.mean((2, 3)) if self.head == "mean" else y.amax((2, 3)))


def check(plan: Plan, *, library: bool = False) -> None:
    """Trace, fold, transform, quantize, export and, where asked for, compile; raise where anything differs.

    Every step is compared with the model by the engine itself.  Of the result every grid of levels has to be as good as a plain
    one, and its outputs may be off by what the errors of these levels make of them.

    Parameters
    ----------
    plan : Plan
        The network.
    library : bool, optional
        Whether to compile the result and compare the library with the program.
    """
    model = Composed(plan)
    inputs = torch.randn(32, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            expected = model(inputs.clone())
    except RuntimeError as error:
        if "view size is not compatible" in str(error):  # PyTorch itself refuses this network
            return
        raise
    assert torch.isfinite(expected).all()
    spec = QuantSpec(
        w_bits=plan.bits, a_bits=plan.bits, preset="fast", num_samples=32, equalization=plan.equalize
    )
    quantized, _ = quantize(model, spec, inputs.split(16))  # every step is compared with the model
    program = export_program(quantized, inputs[:2])
    run = program.module(check_guards=False)
    with torch.no_grad():
        for rows in (1, 5):
            found = run(inputs[:rows])
            assert found.shape == expected[:rows].shape
            assert torch.allclose(found, quantized(inputs[:rows]), rtol=1e-4, atol=1e-5)
        noise = float((quantized(inputs) - expected).square().mean().sqrt())
    worse, place = worst_grid(run, inputs)
    assert worse <= _GRID, f"the levels of {place} are {worse:.3g} times as far off as rounding explains"
    # Biases take back what the levels of all positions lose in the mean, those that the head does not read among them.
    allowed = _FACTOR * expected_noise(run, inputs) + 1e-3 * float(expected.std())
    assert noise <= allowed, f"outputs are {noise:.3g} off, rounding explains {allowed:.3g}"
    if library:
        _compare_library(program, inputs)


def _compare_library(program: torch.export.ExportedProgram, inputs: Tensor) -> None:
    import tvm_backend
    from tvm_backend.target import native

    run = program.module(check_guards=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        # unoptimized code takes half the time to generate and computes the same
        tvm_backend.compile(program, target={**native(), "opt-level": 0}, out=path, cache=False)
        compiled = tvm_backend.load(path)
        for rows in (1, 5):
            with torch.no_grad():
                expected = run(inputs[:rows])
            found = torch.from_numpy(compiled(inputs[:rows].numpy()).copy())
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def main() -> None:
    """Try networks that are drawn anew."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="networks to try")
    parser.add_argument("--compile", type=int, default=0, help="compile every so many")
    options = parser.parse_args()
    tried = 0

    @settings(
        max_examples=options.count,
        database=None,
        derandomize=False,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans())
    def run(plan: Plan) -> None:
        nonlocal tried
        tried += 1
        check(plan, library=bool(options.compile) and tried % options.compile == 0)

    run()
    print(f"{tried} networks, none of which came out differently")


if __name__ == "__main__":
    main()
