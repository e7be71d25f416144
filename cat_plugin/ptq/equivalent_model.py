"""``transform``: the caller's own model with its channels scaled, shifted and rotated, for others to round.

Everything that is folded into weights changes parameters and nothing else, so that it can be written back into a copy of the
model, whose layers are then those that algorithms of other packages look for.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from cat_plugin.errors import CATTypeError, CATValueError
from cat_plugin.models import device_of, evaluating, full_float32
from cat_plugin.ptq.cache import TensorStore
from cat_plugin.ptq.calibration import gather_inputs
from cat_plugin.ptq.pipeline import run_stages
from cat_plugin.ptq.progress import Progress, Reporter
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.ptq.stages.equivalent import EquivalentTransforms
from cat_plugin.ptq.stages.preparation import Trace
from cat_plugin.ptq.stages.smoothing import TrainedSmoothing
from cat_plugin.ptq.stages.stage import Stage, Step
from cat_plugin.ptq.state import State
from cat_plugin.ptq.transforms.rotation.rotation import InnerRotation, Rotation
from cat_plugin.ptq.transforms.smoothing.matrices import MATRICES
from cat_plugin.ptq.transforms.smoothing.smoothing import Smoothing

__all__ = ["transform"]


def transform(
    model: nn.Module,
    spec: QuantSpec,
    calibration: Iterable[Any] | Tensor,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> nn.Module:
    """Make a model easier to quantize, and leave its rounding to others.

    Parameters
    ----------
    model : nn.Module
        Left unchanged.
    spec : QuantSpec
        ``smoothing``, ``smoothing_strength``, ``smoothing_epochs`` and ``rotation`` say what is done; the bits, groups and
        ``weight_only`` what it is done for.
    calibration : iterable or Tensor
        Input batches, as :func:`cat_plugin.ptq.quantize` takes them.
    progress : callable or None
        Called with a :class:`~cat_plugin.ptq.progress.Progress` now and then.

    Returns
    -------
    nn.Module
        A copy of the model with other parameters, which computes the same in full precision; that is checked.

    Raises
    ------
    CATValueError
        If something is asked for that is no change of parameters alone, or a parameter that is used in two places would have
        to change in one.
    QuantizationError
        If the model cannot be traced.
    """
    if not isinstance(spec, QuantSpec):
        raise CATTypeError(f"spec is a {type(spec).__name__}; expected a QuantSpec.")
    if spec.smoothing is None and spec.rotation is None:
        raise CATValueError("neither smoothing nor rotation is given; expected one of them, or both.")
    if spec.rotation == "online":
        raise CATValueError(
            "rotation is 'online', which adds products to the network; expected 'folded' where the rounding is another's."
        )
    if spec.smoothing in MATRICES:
        raise CATValueError(
            f"smoothing is {spec.smoothing!r}, which adds products to the network; expected one that is folded into parameters "
            "where the rounding is another's."
        )
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(TensorStore(None if spec.memory_mb is None else spec.memory_mb << 20))
        inputs = gather_inputs(calibration, spec.num_samples, None if spec.memory_mb is None else store)
        inputs = inputs.mapped(lambda x: x.float() if x.is_floating_point() else x)
        home = device_of(model) or inputs.device
        result, shared = _apart(model)
        stack.enter_context(evaluating(result, warn=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_float32())
        state = State(result, spec, inputs.to(home), home, home, store, Reporter(progress))
        before = _Constants()
        folded = (Rotation(), Smoothing(functions=False), InnerRotation())
        run_stages(state, stages=(Trace(), before, EquivalentTransforms(folded), TrainedSmoothing()))
        _write_back(result, state.module, before.values)
        state.equivalence.check("transform", result)
        for first, second in shared:
            a, b = _parameter(result, first), _parameter(result, second)
            if a is not None and b is not None and torch.equal(a, b):
                _set(result, second, a)
    return result


def _apart(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str]]]:
    """A copy in which no two modules share a parameter, and the names of those that did."""
    result, first, shared = copy.deepcopy(model), dict[int, str](), list[tuple[str, str]]()
    for name, value in list(result.named_parameters(remove_duplicate=False)):
        if id(value) in first:
            shared.append((first[id(value)], name))
            _set(result, name, nn.Parameter(value.detach().clone(), value.requires_grad))
        else:
            first[id(value)] = name
    return result, shared


class _Constants(Stage):
    """What the graph's constants are before anything is done to them."""

    name = "constants"
    checkpointed = False
    keeps_values = False

    def applies(self, spec: QuantSpec) -> bool:
        return True

    def exact(self, state: State) -> bool:
        return False

    def run(self, state: State) -> Iterator[Step]:
        self.values = {name: value.clone() for name, value in state.module.named_buffers()}
        yield from ()


def _write_back(model: nn.Module, module: fx.GraphModule, before: dict[str, Tensor]) -> None:
    """Give the model the parameters that its transformed graph has, in place."""
    found: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(value, Tensor):
            continue
        source = str(node.meta.get("source"))
        if source in found and not torch.equal(found[source], value):
            raise CATValueError(
                f"the parameter {source} is used in two places, of which one alone is to change; give the second a copy of "
                "its own (such as an output layer apart from the embedding) before the model is transformed."
            )
        if str(node.target) not in before or not torch.equal(before[str(node.target)], value):
            found[source] = value
        elif _parameter(model, source) is not None:
            found.setdefault(source, value)
    for source, value in found.items():
        old = _parameter(model, source)
        if old is None or old.shape != value.shape:
            raise CATValueError(
                f"{source} is computed from the model's parameters, and cannot be set; expected weights, biases and factors of "
                "norms that are parameters themselves. Quantize by the engine (without a base) instead."
            )
        new = value.detach().clone().to(old)
        _set(model, source, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, value)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    """The model's parameter or buffer of a name."""
    path, _, last = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(path), last, None)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None
