"""What holds for every pass."""

from __future__ import annotations

import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from cat_plugin.errors import CompileError
from tests.tvm_backend.passes.tools import CONV, untouched
from tvm_backend import compat, dialect
from tvm_backend.passes.dump import Dump
from tvm_backend.passes.lower_kernels import LowerKernels
from tvm_backend.passes.pipeline import INTEGER_PASSES, integer_kernels, library_passes
from tvm_backend.passes.schedule_loops import ScheduleLoops
from tvm_backend.target import resolve


def test_passes_leave_a_float_graph_untouched():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32"), w: R.Tensor((4, 3, 3, 3), "float32")):
            with R.dataflow():
                lv = R.nn.conv2d(x, w, padding=(1, 1))
                lv1 = R.nn.relu(lv)
                lv2 = R.nn.max_pool2d(lv1, (2, 2), (2, 2))
                gv = R.nn.softmax(lv2, axis=1)
                R.output(gv)
            return gv

    for step in INTEGER_PASSES:
        untouched(step, Module)


def test_dump_has_the_module_after_each_pass(tmp_path):
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 3, 8, 8), "float32")):
            with R.dataflow():
                lv = dialect.quantize(x, CONV.input)
                gv = dialect.dequantize(lv, CONV.input)
                R.output(gv)
            return gv

    folder = tmp_path / "dump"
    folder.mkdir()
    for name in ("99_Old.py", "notes.txt"):
        (folder / name).write_text("")
    after = integer_kernels(Module, Dump(folder))
    written = sorted(folder.glob("*.py"))
    names = [file.stem.partition("_")[2] for file in written]
    assert names == ["Imported", *(str(step.info.name) for step in INTEGER_PASSES)]
    assert (folder / "notes.txt").exists()
    assert "cat.quantize" in written[0].read_text()
    assert written[-1].read_text() == after.script(show_meta=False) + "\n"
    border = names.index("FoldBorder")
    assert "QuantizeSpec" not in written[border - 1].read_text()
    assert "QuantizeSpec" in written[border].read_text()

    target = next(iter(resolve("native").values()))
    lower = LowerKernels(target)
    made = library_passes(target, lower, ScheduleLoops(), Dump(folder).variant(""))(after)
    steps = sorted((folder / "library").iterdir())
    lowered = next(file for file in steps if file.stem.endswith("LowerKernels"))
    assert "cat.kernel" not in lowered.read_text()
    assert "T.prim_func" in lowered.read_text()
    assert steps[-1].read_text() == made.script(show_meta=False) + "\n"
    compat.assert_structural_equal(made, library_passes(target, LowerKernels(target), ScheduleLoops())(after))


def test_dump_into_what_is_no_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="cannot write the modules after each pass to"):
        Dump(tmp_path / "file")
