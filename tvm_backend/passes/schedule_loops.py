"""Schedule the loops of the operators left in float, for a processor; see :mod:`tvm_backend.kernels.loops`."""

from __future__ import annotations

import tvm
from tvm import tirx

from tvm_backend import compat
from tvm_backend.kernels.loops import scheduled

__all__ = ["ScheduleLoops"]


def _schedule(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    changed = {
        variable: scheduled(function)
        for variable, function in compat.functions(mod)
        if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs
    }
    return compat.with_functions(mod, changed)


ScheduleLoops = tvm.transform.module_pass(_schedule, opt_level=0, name="ScheduleLoops")
