"""Put the PrimFuncs in the place of symbolic operators, and packed weights in the place of plain ones.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))
    lv1 = cat.cluster_affine(z, mean, components, centroids, gamma, beta, alpha=0.4)

After::

    lv = R.call_tir(cls.conv..., (x, w_packed, compensation, scale, bias), out_ty=...)
    lv1 = R.call_tir(cls.cluster_affine, (z, mean, components, centroids, gamma, beta), out_ty=...)

Equal specifications share one function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from cat_plugin.errors import CompileError
from tvm_backend import compat, dialect
from tvm_backend.kernels import cluster_affine, registry
from tvm_backend.kernels.packing import zero_point_sums
from tvm_backend.kernels.spec import ConvSpec, LinearSpec
from tvm_backend.passes.rewriter import Rewriter, as_pass

__all__ = ["lower_kernels"]


class _Lower(Rewriter):
    target: Any = None

    def visit(self, expr: Any) -> Any | None:
        call = dialect.match(expr)
        if call is None:
            return None
        if call.name == "kernel":
            return self._kernel(expr, call)
        if call.name in dialect.CORRECTIONS:
            return self._correction(expr, call)
        raise CompileError(f"the operator cat.{call.name} was left over by the passes; this is a defect of the compiler")

    def _call(self, name: str, function: Any, args: list[Any], out: Any) -> Any:
        variable = self.builder.add_func(function.with_attr("global_symbol", name), name)
        fields = compat.tuple_fields(out)
        return relax.call_tir(variable, args, out if fields is None else fields)

    def _kernel(self, expr: Any, call: dialect.SymbolicCall) -> Any:
        kernel = registry.lower(call.attributes, self.target)
        args = list(call.args)
        if isinstance(call.attributes, ConvSpec | LinearSpec):
            values = compat.constant_value(args[1])
            sums = zero_point_sums(values, call.attributes.input.zero_point)
            args[1:2] = [compat.constant(np.asarray(kernel.pack_weight(values))), compat.constant(sums)]
        return self._call(kernel.name, kernel.prim_func, args, compat.type_of(self.current))

    def _correction(self, expr: Any, call: dialect.SymbolicCall) -> Any:
        shapes = [dialect.shape_of(arg) for arg in call.args]
        logits, *rest = shapes
        features = rest.pop(0)[1] if call.attributes["features"] else 0
        _, components, centroids, *maps = rest
        d = components[0]
        function = cluster_affine.prim_func(
            f"cat::{call.name}",
            n_classes=logits[1],
            n_clusters=centroids[0],
            n_components=d,
            n_features=features,
            rank=maps[2][2] if call.name == "cluster_affine_lowrank" else 0,
            alpha=call.attributes["alpha"],
            batch=dialect.static_batch(call.args[0]),
            dtype=str(compat.type_of(call.args[0]).dtype),
            n_distance_components=centroids[1] if d else None,
            target=self.target,
        )
        return self._call(call.name, function, call.args, compat.type_of(self.current))


def lower_kernels(target: tvm.target.Target) -> Any:
    """The pass for one target.

    Parameters
    ----------
    target : tvm.target.Target
        Decides which kernels are taken.
    """
    return as_pass(type("_LowerFor", (_Lower,), {"target": target}), "LowerKernels")
