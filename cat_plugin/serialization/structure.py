"""Modules as plain data: graphs node by node, modules by class and attributes, tensors apart.

What is written can be read back without pickle: functions are named and looked up in a list of known
places, classes come from the packages of torch and of the host only, and numbers are numbers.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import fx, nn

from cat_plugin.errors import BundleError, ExportError
from cat_plugin.serialization.interface import call_of, give_call, is_flat
from cat_plugin.structures import output_names, plain_structure
from cat_plugin.torch_compat import (
    NATIVE_FUNCTIONS,
    PACKED_MODULES,
    QUANTIZED_MODULES,
    OpOverload,
    linear_packed_parameters,
    pytree,
    quantized_tensor,
    schema_of,
)

__all__ = ["decode", "decode_graph", "decode_module", "encode", "encode_graph", "encode_module", "tensors_of"]

_CLASS_ROOTS = ("torch.nn.", QUANTIZED_MODULES, "torchao.", "neural_compressor.")
_FUNCTION_ROOTS = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": NATIVE_FUNCTIONS,
    "operator": operator,
    "_operator": operator,
    "math": math,
}
_TORCH_NAMES = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}
_NAMESPACES = ("aten", "quantized", "quantized_decomposed", "prims", "cat", "torchao", "onednn")
_BLANK = frozenset(vars(nn.Module())) | {"training"}
_PATH = re.compile(r"(?!__)\w+(\.(?!__)\w+)*")


def encode(value: Any) -> Any:
    """A value of a graph or an attribute as JSON."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) in _TORCH_NAMES:
        return {_TORCH_NAMES[type(value)]: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, torch.Size):
        return {"tuple": [int(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, Mapping):
        return {"items": [[encode(key), encode(item)] for key, item in value.items()]}
    raise ExportError(
        f"a {type(value).__name__} ({value!r:.80}) is part of the quantized model and cannot be written as plain data"
    )


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The value that :func:`encode` wrote."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "float":
        return float(content)
    if kind == "node":
        return nodes[content]
    if kind == "device":
        return torch.device(content)
    if kind in ("dtype", "memory_format", "layout"):
        found = getattr(torch, content, None)
        if type(found) not in _TORCH_NAMES:
            raise BundleError(f"torch.{content} is not a {kind}; the file is damaged")
        return found
    if kind == "slice":
        return slice(*(decode(item, nodes) for item in content))
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: decode(item, nodes) for key, item in content.items()}
    if kind == "items":
        return {decode(key, nodes): decode(item, nodes) for key, item in content}
    raise BundleError(f"unknown kind of value {kind!r}; the file is damaged or of a newer version")


def _name_function(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"op:{target.namespace}:{schema_of(target).name.split('::')[1]}:{target._overloadname}"
    for root, module in _FUNCTION_ROOTS.items():
        name = getattr(target, "__name__", "")
        if name and getattr(module, name, None) is target:
            return f"{root}:{name}"
    raise ExportError(f"the function {target!r} is part of the quantized model and is not known by name")


def _find_function(name: str) -> Any:
    root, _, rest = name.partition(":")
    found = None
    if root == "op":
        namespace, packet, overload = rest.split(":")
        if namespace in _NAMESPACES and packet != "from_file":
            found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    elif rest != "from_file" and not rest.startswith("_"):
        found = getattr(_FUNCTION_ROOTS.get(root), rest, None)
        # Of torch itself only what computes: torch.load and its like are written in Python.
        if root != "torch.nn.functional" and not isinstance(found, BuiltinFunctionType):
            found = None
    if not callable(found) or isinstance(found, type):
        raise BundleError(
            f"{name!r} is not a function of a known place; the file is damaged or of a newer version"
        )
    return found


def encode_graph(module: fx.GraphModule) -> dict[str, Any]:
    """The graph of a module as JSON, with the modules that it calls.

    Parameters
    ----------
    module : torch.fx.GraphModule
        Its tensors are not part of the result; see :func:`tensors_of`.

    Returns
    -------
    dict

    Raises
    ------
    ExportError
        When something in the graph has no name or is no plain value.
    """
    info = getattr(module.graph._codegen, "pytree_info", None)
    flat = info is None or is_flat(info.in_spec)
    nodes = []
    called: dict[str, Any] = {}
    for node in module.graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _name_function(target)
        elif node.op == "call_module":
            submodule = module.get_submodule(target)
            if not node.users and not list(submodule.state_dict()):
                # Checks of shapes and the like, put there by torch.export.
                continue
            called[target] = encode_module(submodule)
        args = node.args
        if node.op == "output" and info is not None and flat:
            args = (plain_structure(pytree.tree_unflatten(list(node.args[0]), info.out_spec)),)
        nodes.append([node.op, node.name, target, encode(tuple(args)), encode(dict(node.kwargs))])
    return {
        "nodes": nodes,
        "modules": called,
        "call": None if info is None or flat else call_of(info),
        "output_names": output_names(module),
    }


def decode_graph(data: Mapping[str, Any], tensors: Mapping[str, Any]) -> fx.GraphModule:
    """The module that :func:`encode_graph` wrote.

    Parameters
    ----------
    data : mapping
        What it returned.
    tensors : mapping of str to Tensor
        The module's tensors by their full name.
    """
    root = nn.Module()
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for path, description in data["modules"].items():
        _check_names("call_module", path, {})
        _put_module(root, path, decode_module(description, tensors, f"{path}."))
    for op, name, target, args, kwargs in data["nodes"]:
        _check_names(op, target, decode(kwargs, made))
        if op == "call_function":
            target = _find_function(target)
        elif op == "get_attr":
            _put_tensor(root, target, tensors)
        elif op not in ("placeholder", "output", "call_module", "call_method"):
            raise BundleError(
                f"unknown operation {op!r} in the graph; the file is damaged or of a newer version"
            )
        made[name] = graph.create_node(op, target, decode(args, made), decode(kwargs, made), name)
    if data.get("call") is not None:
        give_call(graph, data["call"])
    graph.lint()
    module = fx.GraphModule(root, graph)
    if data.get("output_names") is not None:
        module.meta["output_names"] = [str(name) for name in data["output_names"]]
    module.training = False
    return module


def _check_names(op: str, target: Any, keywords: Any) -> None:
    """Refuse what is no name: the graph's forward function is made of these as source text."""
    good = isinstance(keywords, dict) and all(isinstance(key, str) and key.isidentifier() for key in keywords)
    if op in ("get_attr", "call_module"):
        good = good and isinstance(target, str) and _PATH.fullmatch(target) is not None
    elif op == "placeholder":
        good = good and isinstance(target, str) and target.isidentifier()
    elif op == "call_method":
        # Of a tensor's own methods those that are public; each of them computes.
        good = good and isinstance(target, str) and target[:1] != "_" and hasattr(torch.Tensor, target)
    if not good:
        raise BundleError(f"{target!r:.100} is no name that a {op} of a graph can have; the file is damaged")


def _put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    setattr(root, last, module)


def _put_tensor(root: nn.Module, path: str, tensors: Mapping[str, Any]) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if not hasattr(root, last):
        if path not in tensors:
            raise BundleError(f"the tensor {path} is missing; the files do not belong together")
        root.register_buffer(last, tensors[path])


def _class_name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def encode_module(module: nn.Module) -> dict[str, Any]:
    """A module of torch or of the host by class and attributes; its tensors are apart.

    Raises
    ------
    ExportError
        When the class is from elsewhere, or an attribute is no plain value.
    """
    name = _class_name(module)
    if not name.startswith(_CLASS_ROOTS):
        raise ExportError(f"a module of class {name} is part of the quantized model; only those of torch and of the "
                          "host can be written as plain data")  # fmt: skip
    skipped = {"_packed_params", "save"}
    plain = {key: value for key, value in vars(module).items() if key not in _BLANK and key not in skipped}
    if not name.startswith(PACKED_MODULES):
        plain = {key: value for key, value in plain.items() if not callable(value)}
    return {
        "class": name,
        "attributes": {key: encode(value) for key, value in plain.items() if not isinstance(value, torch.Tensor)},
        "tensors": sorted(key for key, value in plain.items() if isinstance(value, torch.Tensor)),
        "children": {key: encode_module(child) for key, child in module._modules.items()
                     if child is not None and key not in skipped},
        "buffers": sorted(key for key, value in module._buffers.items() if value is not None),
        "parameters": sorted(key for key, value in module._parameters.items() if value is not None),
        "absent": sorted(key for group in (module._buffers, module._parameters)
                         for key, value in group.items() if value is None),
    }  # fmt: skip


def decode_module(data: Mapping[str, Any], tensors: Mapping[str, Any], prefix: str) -> nn.Module:
    """The module that :func:`encode_module` wrote, with the tensors whose names start with `prefix`."""
    name = data["class"]
    if not name.startswith(_CLASS_ROOTS):
        raise BundleError(f"the class {name!r} is none of torch or the host; the file is damaged")
    place, _, last = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(place), last)
    except (ImportError, AttributeError):
        raise BundleError(
            f"{name} does not exist here; load the model with the release of the host that it was saved with"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise BundleError(f"{name!r} is not a module class; the file is damaged")
    module: nn.Module = kind.__new__(kind)
    nn.Module.__init__(module)
    for key, value in data["attributes"].items():
        module.__dict__[key] = decode(value, {})
    try:
        for key in data["parameters"]:
            module.register_parameter(key, nn.Parameter(tensors[prefix + key], requires_grad=False))
        for key in data["buffers"]:
            module.register_buffer(key, tensors[prefix + key])
        for key in data["tensors"]:
            module.__dict__[key] = tensors[f"{prefix}attribute.{key}"]
    except KeyError as error:
        raise BundleError(f"the tensor {error} is missing; the files do not belong together") from None
    for key in data["absent"]:
        module.register_buffer(key, None)
    for key, child in data["children"].items():
        module.add_module(key, decode_module(child, tensors, f"{prefix}{key}."))
    if name.startswith(PACKED_MODULES):
        _pack(module, tensors, prefix)
    module.training = False
    return module


def _pack(module: nn.Module, tensors: Mapping[str, Any], prefix: str) -> None:
    """Give a quantized module of torch its packed weight."""
    if prefix + "packed.weight" not in tensors:
        return
    values = tensors[prefix + "packed.weight"]
    scales = tensors[prefix + "packed.scales"]
    zero_points = tensors[prefix + "packed.zero_points"]
    axis = int(tensors[prefix + "packed.axis"])
    weight = quantized_tensor(values, scales, zero_points, axis)
    if "Linear" in type(module).__name__:
        module._packed_params = linear_packed_parameters()
    module.set_weight_bias(weight, tensors.get(prefix + "packed.bias"))  # type: ignore[operator]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a module by its full name: parameters, buffers, packed weights."""
    found: dict[str, torch.Tensor] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, fx.GraphModule):
            for node in child.graph.nodes:
                if node.op == "get_attr":
                    value = operator.attrgetter(node.target)(child)
                    if isinstance(value, torch.Tensor):
                        found[prefix + node.target] = value.detach()
        if _class_name(child).startswith(_CLASS_ROOTS):
            for key, value in vars(child).items():
                if isinstance(value, torch.Tensor):
                    found[f"{prefix}attribute.{key}"] = value.detach()
        for group in (child._parameters, child._buffers):
            for key, value in group.items():
                if value is not None:
                    found[prefix + key] = value.detach()
        if _class_name(child).startswith(PACKED_MODULES) and hasattr(child, "_weight_bias"):
            found.update({f"{prefix}packed.{key}": value for key, value in _packed(child).items()})
    return {name: value.cpu().contiguous() for name, value in found.items()}


def _packed(module: Any) -> dict[str, torch.Tensor]:
    weight, bias = module._weight_bias()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    parts = {
        "weight": weight.int_repr(),
        "scales": weight.q_per_channel_scales()
        if per_channel
        else torch.tensor(weight.q_scale(), dtype=torch.float64),
        "zero_points": weight.q_per_channel_zero_points()
        if per_channel
        else torch.tensor(weight.q_zero_point()),
        "axis": torch.tensor(weight.q_per_channel_axis() if per_channel else -1),
    }
    if bias is not None:
        parts["bias"] = bias.detach()
    return parts
