"""Schedule the loops of the operators left in float, for a processor; see :mod:`tvm_backend.kernels.loops`."""

from __future__ import annotations

import tvm
from tvm import tirx

from tvm_backend import compat
from tvm_backend.kernels.loops import scheduled

__all__ = ["ScheduleLoops"]


class ScheduleLoops:
    """The pass, which keeps what it has scheduled as it was, for what TVM cannot compile otherwise.

    Attributes
    ----------
    pass_ : tvm.transform.Pass
        To be put into a pipeline.
    plain : dict of str to tvm.tirx.PrimFunc
        By its name, each function that was changed.
    """

    def __init__(self) -> None:
        self.plain: dict[str, tirx.PrimFunc] = {}
        self.pass_ = tvm.transform.module_pass(self._schedule, opt_level=0, name="ScheduleLoops")

    def _schedule(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        changed = {}
        for variable, function in compat.functions(mod):
            if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs:
                changed[variable] = scheduled(function)
                self.plain[str(variable.name_hint)] = function
        return compat.with_functions(mod, changed)
