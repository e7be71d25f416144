"""Import a torch module, run what TVM makes of it, and compare; at two batch sizes, on rows that are not round numbers."""

from __future__ import annotations

import numpy as np
import torch
import tvm
from torch import nn
from tvm import relax

from tvm_backend.importer import import_program


class Called(nn.Module):
    """A function as a module; modules that it uses are given by name."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(*args)


def exported(function, *inputs, **modules):
    module = (function if isinstance(function, nn.Module) else Called(function, **modules)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    dynamic = shapes if isinstance(function, nn.Module) else (shapes,)
    return torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic)


def _flat(result):
    return list(result) if isinstance(result, tuple | list) else [result]


def differences(function, *inputs, **modules):
    """The largest difference to torch in each output, over both batch sizes."""
    program = exported(function, *inputs, **modules)
    target = tvm.target.Target("llvm")
    executable = tvm.compile(
        import_program(program), target=target, relax_pipeline=relax.get_default_pipeline(target)
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    worst = []
    for rows in (inputs[0].shape[0], 1):
        given = [value[:rows].contiguous() for value in inputs]
        with torch.no_grad():
            wanted = _flat(program.module()(*given))
        result = machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in given))
        actual = [result] if hasattr(result, "numpy") else [result[i] for i in range(len(wanted))]
        errors = []
        for a, w in zip(actual, wanted, strict=True):
            assert tuple(a.shape) == tuple(w.shape)
            assert str(a.dtype) == str(w.dtype).removeprefix("torch.")
            errors.append(
                float(np.max(np.abs(a.numpy().astype("float64") - w.numpy().astype("float64")), initial=0))
            )
        worst.append(errors)
    return [max(pair) for pair in zip(*worst, strict=True)]
