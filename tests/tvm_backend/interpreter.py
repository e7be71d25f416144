"""Runs a module of symbolic operators with torch on integers held in float64: an independent reference for the passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from tvm_backend import compat, dialect
from tvm_backend.kernels import spec as s

F = torch.nn.functional


def _store(value: torch.Tensor, kind: Any) -> torch.Tensor:
    if kind == "float32":
        return value
    q = torch.round(value.float() * np.float32(1.0 / kind.scale)) + kind.zero_point
    return torch.clamp(q, kind.qmin, kind.qmax).double()


def _real(value: torch.Tensor, kind: Any) -> torch.Tensor:
    return (
        value if kind == "float32" else ((value - kind.zero_point).float() * np.float32(kind.scale)).double()
    )


def _finish(value: torch.Tensor, epilogue: s.Epilogue, residual: torch.Tensor | None) -> Any:
    if getattr(epilogue, "branch", None) is not None:
        value = _real(_store(value, epilogue.branch), epilogue.branch)
    if residual is not None:
        value = value + _real(residual, epilogue.residual)
    low, high = epilogue.clip
    if low is not None or high is not None:
        value = torch.clamp(value, low, high)
    outputs = [_store(value, kind) for kind in epilogue.outputs]
    return outputs[0] if len(outputs) == 1 else outputs


def _pool(x: torch.Tensor, spec: s.PoolSpec) -> torch.Tensor:
    real = _real(x, spec.input).permute(0, 3, 1, 2)
    assert spec.padding[:2] == spec.padding[2:]
    arguments = (spec.kernel, spec.stride, spec.padding[:2])
    if spec.kind == "max":
        out = F.max_pool2d(real, *arguments, ceil_mode=spec.ceil_mode)
    else:
        out = F.avg_pool2d(real, *arguments, spec.ceil_mode, spec.count_include_pad)
    return out.permute(0, 2, 3, 1)


def _tokens(x: torch.Tensor, spec: s.TokensSpec) -> Any:
    low, high = x.amin(-1, True).clamp(max=0.0) * spec.share, x.amax(-1, True).clamp(min=0.0) * spec.share
    scale = ((high - low) / spec.qmax).clamp(min=s.LEAST_SCALE)
    zero = torch.round(-low / scale)
    integers = torch.clamp(torch.round(x / scale + zero), 0, spec.qmax)
    return (integers - zero) * scale if spec.real else [integers, torch.cat([scale, zero], -1)]


def _kernel(spec: Any, args: list[torch.Tensor]) -> Any:
    if isinstance(spec, s.QuantizeSpec):
        x = args[0].permute(0, 2, 3, 1) if spec.to_channels_last else args[0]
        outputs = [_store(x, q) for q in spec.outputs]
        return outputs[0] if len(outputs) == 1 else outputs
    if isinstance(spec, s.DequantizeSpec):
        x = _real(args[0], spec.input)
        return x.permute(0, 3, 1, 2) if spec.to_channels_first else x
    if isinstance(spec, s.ConvSpec):
        top, left, bottom, right = spec.padding
        x = F.pad((args[0] - spec.input.zero_point).permute(0, 3, 1, 2), (left, right, top, bottom))
        acc = F.conv2d(x, args[1], None, spec.stride, 0, spec.dilation, spec.groups).permute(0, 2, 3, 1)
        return _finish(acc * args[2] + args[3], spec.epilogue, args[4] if len(args) > 4 else None)
    if isinstance(spec, s.TokensSpec):
        return _tokens(args[0], spec)
    if isinstance(spec, s.GroupedLinearSpec):
        x, weight, scales, bias, *further = args
        zero = further[0][:, 1:] if spec.tokens else 0 if spec.real else spec.input.zero_point
        parts = [(x - zero).unflatten(-1, (spec.groups, -1)), weight.unflatten(-1, (spec.groups, -1))]
        value = (torch.einsum("ngk,cgk->ngc", *parts) * scales).sum(1)
        value = value * further.pop(0)[:, :1] if spec.tokens else value
        return _finish(value + bias, spec.epilogue, further[0] if further else None)
    if isinstance(spec, s.LinearSpec):
        acc = (args[0] - spec.input.zero_point) @ args[1].T
        return _finish(acc * args[2] + args[3], spec.epilogue, args[4] if len(args) > 4 else None)
    if isinstance(spec, s.PoolSpec):
        return _finish(_pool(args[0], spec), spec.epilogue, args[1] if len(args) > 1 else None)
    if isinstance(spec, s.ElementwiseSpec):
        value = sum(_real(x, kind) for x, kind in zip(args, spec.inputs, strict=True))
        return _finish(value, spec.epilogue, None)
    if isinstance(spec, s.ConcatSpec):
        value = torch.cat([_real(x, kind) for x, kind in zip(args, spec.inputs, strict=True)], -1)
        return _finish(value, spec.epilogue, None)
    assert isinstance(spec, s.SubsampleSpec)
    x = args[0][:, :: spec.stride[0], :: spec.stride[1]]
    return F.pad(x, (spec.before, spec.after), value=spec.input.zero_point)


def _relax(expr: Any, args: list[Any]) -> Any:
    name = compat.op_name(expr)
    if name == "reshape":
        return args[0].reshape(args[0].shape[0], -1) if len(expr.args[1].values) == 2 else None
    if name == "permute_dims":
        return args[0].permute(*compat.ints(expr.attrs.axes))
    if name == "squeeze":
        for axis in sorted(compat.ints(expr.attrs.axis), reverse=True):
            args[0] = args[0].squeeze(axis)
        return args[0]
    if name == "expand_dims":
        return args[0].unsqueeze(*compat.ints(expr.attrs.axis))
    simple = {"add": torch.add, "nn.relu": torch.relu, "multiply": torch.mul, "sigmoid": torch.sigmoid}
    if name in simple:
        return simple[name](*args)
    raise NotImplementedError(f"the reference does not know {name or type(expr)}")


def interpret(mod: Any, *inputs: torch.Tensor) -> Any:
    """The result of ``main``."""
    function = mod["main"]
    env: dict[Any, Any] = {p: x.double() for p, x in zip(function.params, inputs, strict=True)}

    def value(expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return env[expr]
        if isinstance(expr, relax.Tuple):
            return [value(field) for field in expr.fields]
        if compat.is_constant(expr):
            return torch.from_numpy(np.array(compat.constant_value(expr))).double()
        return None

    for binding in function.body.blocks[0].bindings:
        expr = binding.value
        call = dialect.match(expr)
        if isinstance(expr, relax.TupleGetItem):
            result = value(expr.tuple_value)[expr.index]
        elif call is not None and call.name == "kernel":
            result = _kernel(call.attributes, [value(arg) for arg in call.args])
        elif call is not None and call.name in dialect.CORRECTIONS:
            tensors = [value(arg).float() for arg in call.args]
            if call.name == "cluster_affine_full" and not call.attributes["features"]:
                tensors.insert(1, None)
            result = getattr(torch.ops.cat, call.name)(*tensors, call.attributes["alpha"]).double()
        elif isinstance(expr, relax.Call):
            result = _relax(expr, [value(arg) for arg in expr.args])
        else:
            result = value(expr)
        env[binding.var] = result
    return value(function.body.body)
