"""What every pass stands on: one walk over the bindings of a function, in order, replacing some of them."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx

from tvm_backend import compat

__all__ = ["Rewriter", "as_pass"]

_log = logging.getLogger("cat_plugin")


class Rewriter:
    """Rewrite a function whose body is one dataflow block.

    A subclass gives :meth:`visit`, which sees each binding's expression with its operands already rewritten and returns
    what to put in its place, or None to leave it.  What becomes unused disappears afterwards.

    Parameters
    ----------
    mod : tvm.ir.IRModule
        The module that the function belongs to.
    function : relax.Function
        The function to rewrite; it stays as it is.
    taken : set of str
        The names of all functions of the module, those that this pass has added so far among them.
    """

    def __init__(self, mod: tvm.IRModule, function: relax.Function, taken: set[str]) -> None:
        self.mod = mod
        self.taken = taken
        self.function = function
        self.name = str(function.attrs["global_symbol"])
        self.builder = relax.BlockBuilder()
        self._new: dict[relax.Var, relax.Expr] = {}
        self._defined: dict[relax.Var, relax.Expr] = {}
        self._origin: dict[relax.Var, list[relax.Var]] = defaultdict(list)
        self._users: dict[relax.Var, list[relax.Var | None]] = defaultdict(list)
        self._values: dict[relax.Var | None, relax.Expr] = {}
        self.current: relax.Var = None
        self.added: dict[tvm.ir.GlobalVar, relax.Function] = {}

    def visit(self, expr: relax.Expr) -> relax.Expr | None:
        """What replaces `expr`; an expression or a variable of the new function; None leaves it."""
        raise NotImplementedError

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind an expression in the new function; returns its variable."""
        if isinstance(expr, relax.Var) or compat.is_constant(expr):
            return expr
        var = self.builder.emit(expr)
        self._defined[var] = expr
        return var

    def add_function(self, function: tirx.PrimFunc, name: str) -> tvm.ir.GlobalVar:
        """Add a PrimFunc under `name`, numbered when the module has a function of that name; returns its variable."""
        name = self._free(name)
        return self.builder.add_func(function.with_attr("global_symbol", name), name)

    def call_loops(self, compute: Callable[[Any], Any], tensor: relax.Expr, name: str) -> relax.Expr:
        """A call of a new function that computes a tensor expression of a tensor."""
        return self.builder.call_te(compute, tensor, primfunc_name_hint=self._free(name))

    def _free(self, name: str) -> str:
        """A name that no function of the module has; taken from now on."""
        name = next(n for i in itertools.count() if (n := f"{name}_{i}" if i else name) not in self.taken)
        self.taken.add(name)
        return name

    def definition(self, expr: relax.Expr) -> relax.Expr:
        """The expression bound to a variable of the new function; anything else is its own definition."""
        return self._defined.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def users(self, var: relax.Expr) -> list[relax.Expr | None]:
        """The expressions, in the function as it was, that use what `var` of the new function stands for.

        The function's result counts as one use, shown as None.
        """
        return [self._values.get(user) for origin in self._origin[var] for user in self._users[origin]]

    def upcoming_users(self) -> list[relax.Expr | None]:
        """As :meth:`users`, for the binding that is being visited."""
        return [self._values.get(user) for user in self._users[self.current]]

    def sole_user(self, var: relax.Expr) -> bool:
        """Whether `var` has one use only, so that it may be absorbed into what uses it."""
        return len(self.users(var)) == 1

    def _operands(self, expr: relax.Expr) -> list[relax.Var]:
        if isinstance(expr, relax.Var):
            return [expr]
        if isinstance(expr, relax.Call):
            return [v for arg in expr.args for v in self._operands(arg)]
        if isinstance(expr, relax.Tuple):
            return [v for field in expr.fields for v in self._operands(field)]
        if isinstance(expr, relax.TupleGetItem):
            return self._operands(expr.tuple_value)
        return []

    def _substitute(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return self._new.get(expr, expr)
        if isinstance(expr, relax.Call):
            args = [self._substitute(arg) for arg in expr.args]
            return compat.call_with(expr, args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._substitute(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._substitute(expr.tuple_value), expr.index)
        return expr

    def rewrite(self) -> relax.Function:
        """The rewritten function."""
        function = self.function
        blocks = list(function.body.blocks)
        if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
            _log.debug("a function that is not one dataflow block is left as it is")
            return function
        bindings = list(blocks[0].bindings)
        for binding in bindings:
            self._values[binding.var] = binding.value
            for operand in self._operands(binding.value):
                self._users[operand].append(binding.var)
        result = function.body.body
        for operand in self._operands(result):
            self._users[operand].append(None)
        for param in function.params:
            self._origin[param].append(param)
        attributes = dict(function.attrs)
        attributes.pop("global_symbol", None)
        name = self.name
        changed = False
        with self.builder.function(name, list(function.params), attrs=attributes):
            with self.builder.dataflow():
                for binding in bindings:
                    self.current = binding.var
                    expr = self._substitute(binding.value)
                    replacement = self.visit(expr) if isinstance(binding, relax.VarBinding) else None
                    changed = changed or replacement is not None
                    expr = expr if replacement is None else replacement
                    inner = isinstance(binding.var, relax.DataflowVar)
                    var = self.emit(expr) if inner else self.builder.emit_output(expr)
                    self._new[binding.var] = var
                    if isinstance(var, relax.Var):
                        self._defined.setdefault(var, expr)
                        self._origin[var].append(binding.var)
            self.builder.emit_func_output(self._substitute(result))
        built = self.builder.finalize()
        if not changed:
            return function
        for var, added in compat.functions(built):
            if var.name_hint != name:
                self.added[var] = added
        return built[name]


def as_pass(rewriter: type[Rewriter], name: str) -> tvm.transform.Pass:
    """Make a module pass that applies `rewriter` to every relax function, then drops what is unused."""

    def transform(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        updated: dict[tvm.ir.GlobalVar, relax.Function] = {}
        taken = compat.function_names(mod)
        for var, function in compat.functions(mod):
            if isinstance(function, relax.Function):
                rewriting = rewriter(mod, function, taken)
                updated[var] = rewriting.rewrite()
                updated.update(rewriting.added)
        return relax.transform.DeadCodeElimination()(compat.with_functions(mod, updated))

    return tvm.transform.module_pass(transform, opt_level=0, name=name)
