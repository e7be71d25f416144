"""ONNX's LSTM and GRU as torch's, with the gates in torch's order and the parameters under the names of its modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat_plugin.graph.onnx.operators import Known, Step, Value, implements, to_tensor

__all__ = ["RECURRENT", "parameter_names", "recurrent_layers"]

#: What stands for a layer whose parameters are torch's; files have no operators of these names.
RECURRENT = {"LSTM": "TorchLSTM", "GRU": "TorchGRU"}
# Gates in torch's order, by their places in ONNX's: LSTM has input, output, forget, cell; GRU has update, reset, hidden.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
_DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
_FIRST = 3  # of the inputs: what is read, the first hidden state and the first cell state


def parameter_names(step: Step) -> dict[int, str]:
    """What the inputs of a recurrent layer are called that are parameters, by their position; as in torch's modules."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    names = [f"{kind}_l0{side}" for side in ("", "_reverse") for kind in kinds]
    return dict(enumerate(names, _FIRST)) if step.op in RECURRENT.values() else {}


def recurrent_layers(steps: list[Step], known: dict[str, Known]) -> list[Step]:
    """Give LSTM and GRU steps torch's parameters.

    Parameters
    ----------
    steps : list of Step
        Of the graph, in order.
    known : dict of str to Known
        Constants, to which the parameters are added.

    Raises
    ------
    CATValueError
        When a layer computes what torch's does not: other activations, peepholes, lengths for each row.
    """
    return [_layer(step, known) if step.op in RECURRENT else step for step in steps]


def _layer(step: Step, known: dict[str, Known]) -> Step:
    names = [*step.inputs, *[""] * (8 - len(step.inputs))]
    _check(step, names)
    arrays = []
    for name in names[1:4]:
        if name and name not in known:
            raise step.refuse("weights that are computed; expected constants")
        arrays.append(known[name].array if name else None)
    weight, recurrent, bias = arrays
    assert weight is not None
    assert recurrent is not None
    order = _GATES[step.op]
    gates, hidden = len(order), recurrent.shape[2]
    if bias is None:
        bias = np.zeros((len(weight), 2 * gates * hidden), weight.dtype)

    def ordered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        parts = array.reshape(gates, hidden, *array.shape[1:])
        return np.ascontiguousarray(np.concatenate([parts[gate] for gate in order]))

    made = []
    for direction in range(len(weight)):
        inner, outer = np.split(bias[direction], 2)
        for kind, array in zip("ihbo", (weight[direction], recurrent[direction], inner, outer), strict=True):
            name = f"{step.name}\0{kind}{direction}"
            known[name] = Known(ordered(array))
            made.append(name)
    states = (names[5], names[6] if step.op == "LSTM" else "")
    return replace(step, op=RECURRENT[step.op], inputs=(names[0], *states, *made))


def _check(step: Step, names: list[str]) -> None:
    directions = 2 if step.get("direction", "forward") == "bidirectional" else 1
    given = [each.decode() if isinstance(each, bytes) else str(each) for each in step.get("activations", [])]
    if given and [each.lower() for each in given] != [*_DEFAULTS[step.op]] * directions:
        raise step.refuse(f"activations {', '.join(given)}; expected the usual ones, which torch computes")
    if step.get("clip") is not None or step.get("input_forget", 0):
        raise step.refuse("clip or input_forget; expected neither")
    if step.op == "GRU" and not step.get("linear_before_reset", 0):
        raise step.refuse(
            "linear_before_reset=0; torch's GRU multiplies by the reset gate behind the matrix, expected 1"
        )
    if step.get("layout", 0):
        raise step.refuse(
            "layout=1, which ONNX Runtime does not compute either; expected the time axis in front"
        )
    if names[4]:
        raise step.refuse("lengths of the sequences; expected sequences of one length")
    if names[7]:
        raise step.refuse("peepholes, which torch's LSTM lacks")


@implements(*RECURRENT.values())
def _recurrent(step: Step, x: Value, hidden: Value, cell: Value, *parameters: Value) -> tuple[Tensor, ...]:
    sequence = to_tensor(x)
    backwards = step.get("direction", "forward") == "reverse"
    if backwards:
        sequence = sequence.flip(0)
    weights = [to_tensor(each) for each in parameters]
    directions, width = len(weights) // 4, weights[1].shape[1]
    batch = sequence.shape[1]

    def state(given: Value) -> Tensor:
        if given is None:
            return sequence.new_zeros(directions, batch, width)
        first = to_tensor(given)
        # A state that a file for a batch of one holds is that of each row.
        fixed = isinstance(given, Known) and first.shape[1] == 1
        return first.expand(directions, batch, width) if fixed else first

    options = (True, 1, 0.0, False, directions == 2, False)
    if step.op == RECURRENT["LSTM"]:
        out, *last = torch.lstm(sequence, [state(hidden), state(cell)], weights, *options)
    else:
        out, *last = torch.gru(sequence, state(hidden), weights, *options)
    every = out.reshape(out.shape[0], batch, directions, width)
    return (every.flip(0) if backwards else every).transpose(1, 2), *last
