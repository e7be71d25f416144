"""Put the PrimFuncs in the place of symbolic operators, and packed weights in the place of plain ones.

Before::

    lv = cat.kernel(x, w, scale, bias, ConvSpec(...))
    lv1 = cat.cluster_affine(z, mean, components, centroids, gamma, beta, alpha=0.4)

After::

    lv = R.call_tir(cls.conv..., (x, w_packed, compensation, scale, bias, numbers), out_ty=...)
    lv1 = R.call_tir(cls.cluster_affine, (z, mean, components, centroids, gamma, beta), out_ty=...)

Layers that differ in the numbers of their quantizations only share one function, unless the values of their weights allow one of them
a faster one.  For a processor the function is a declaration: what it stands for is compiled by itself and linked, see
:mod:`tvm_backend.objects`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tvm
from tvm import relax, tirx

from cat_plugin.errors import CompileError
from cat_plugin.graph.manifest import corrections
from tvm_backend import compat, dialect
from tvm_backend.kernels import registry
from tvm_backend.kernels.cluster_affine import kernel as cluster_affine
from tvm_backend.kernels.spec import WeightedSpec
from tvm_backend.objects import Source, symbol_of
from tvm_backend.passes.rewriter import Rewriter, as_pass
from tvm_backend.report import KernelEntry
from tvm_backend.target import is_cuda

__all__ = ["LowerKernels"]


class _Lower(Rewriter):
    target: tvm.target.Target = None
    shared: dict[Any, tvm.ir.GlobalVar]  # the function of each kernel, over all functions of the module
    sources: dict[str, Source]
    entries: dict[str, list[KernelEntry]]

    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        call = dialect.match(expr)
        if call is None:
            return None
        if call.name == "kernel":
            return self._kernel(expr, call)
        if call.name in dialect.CORRECTIONS:
            return self._correction(expr, call)
        raise CompileError(
            f"the operator cat.{call.name} was left over by the passes; this is a defect of the compiler"
        )

    def _call(
        self,
        form: Hashable,
        name: str,
        build: Callable[[str], tirx.PrimFunc],
        declare: Callable[[], tirx.PrimFunc],
        args: list[relax.Expr],
    ) -> relax.Expr:
        """Call the function of a form; on a processor it is compiled by itself, so the module only declares it."""
        out = compat.type_of(self.current)
        if form not in self.shared:
            if is_cuda(self.target):
                self.shared[form] = self.add_function(build(name), name)
            else:
                symbol = symbol_of(name, form)
                self.shared[form] = self.add_function(declare(), symbol)
                self.sources[symbol] = Source(repr(form), build)
        fields = compat.tuple_fields(out)
        return relax.call_tir(self.shared[form], args, out if fields is None else fields)

    def _enter(self, key: Any, **facts: Any) -> None:
        """Remember a call of a function that has been added, for the report."""
        name = str(self.shared[key].name_hint)
        self.entries.setdefault(self.name, []).append(KernelEntry(name=name, **facts))

    def _kernel(self, expr: relax.Expr, call: dialect.SymbolicCall) -> relax.Expr:
        args = list(call.args)
        spec = call.attributes
        weighted = isinstance(spec, WeightedSpec)
        values = compat.constant_value(args[1]) if weighted else None
        kernel = registry.lower(spec, self.target, values)
        if values is not None:
            args[1:2] = [
                compat.constant(kernel.pack_weight(values)),
                compat.constant(kernel.compensation(values)),
            ]
            args[3] = compat.constant(kernel.generator.channelwise(compat.constant_value(args[3])))
            if kernel.generator.numbers is not None:
                args.insert(5, compat.constant(kernel.generator.numbers))
        name = kernel.name if spec.batch is None else f"{kernel.name}_b{spec.batch}"
        form = kernel.generator.form
        called = self._call(form, name, kernel.generator.build, lambda: kernel.declaration, args)
        self._enter(
            form,
            kind=spec.operation,
            output=spec.out_shape,
            variant=kernel.variant,
            weight_bits=spec.weight_bits if weighted else 0,
            weight_bytes=compat.constant_value(args[1]).nbytes if weighted else 0,
            operations=kernel.operations,
            bytes=kernel.bytes,
            unpacking=kernel.unpacking,
            remark=kernel.remark,
            tile_state=kernel.machine.has_tile_state,
        )
        return called

    def _correction(self, expr: relax.Expr, call: dialect.SymbolicCall) -> relax.Expr:
        shapes = [dialect.shape_of(arg) for arg in call.args]
        logits, *rest = shapes
        features = rest.pop(0)[1] if call.attributes["features"] else 0
        _, components, centroids, *maps = rest
        d = components[0]
        spec = cluster_affine.ClusterAffineSpec(
            op=f"cat::{call.name}",
            n_classes=logits[1],
            n_clusters=centroids[0],
            n_components=d,
            n_features=features,
            rank=dict(zip(corrections()[call.name].shapes, maps, strict=True)).get("core", (0,))[-1],
            alpha=call.attributes["alpha"],
            batch=dialect.static_batch(call.args[0]),
            dtype=str(compat.type_of(call.args[0]).dtype),
            n_distance_components=centroids[1] if d else None,
        )
        name = call.name if spec.batch is None else f"{call.name}_b{spec.batch}"
        called = self._call(
            spec,
            name,
            lambda _name: cluster_affine.lower(spec, self.target),
            lambda: cluster_affine.declaration(spec),
            call.args,
        )
        self._enter(spec, kind=call.name, output=(logits[1],), bytes=spec.floor_bytes(1))
        return called


class LowerKernels:
    """The pass for one target.

    Parameters
    ----------
    target : tvm.target.Target
        Decides which kernels are taken.

    Attributes
    ----------
    pass_ : tvm.transform.Pass
        The pass.
    sources : dict of str to Source
        On a processor, what the functions that the module only declares are to be compiled from.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self._shared: dict[Any, tvm.ir.GlobalVar] = {}
        self.sources: dict[str, Source] = {}
        self._entries: dict[str, list[KernelEntry]] = {}
        state = {"target": target, "shared": self._shared, "sources": self.sources, "entries": self._entries}
        self.pass_ = as_pass(type("_LowerFor", (_Lower,), state), "LowerKernels")

    def calls(self, function: str = "main") -> list[KernelEntry]:
        """The kernels that a function of the module calls, in order, once the pass has run."""
        return list(self._entries.get(function, []))
