"""The passes that are left out change nothing: kernels become the same objects as with all of TVM's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from tvm.target import Target

from tvm_backend.kernels.registry import lower
from tvm_backend.kernels.spec import ConvSpec, Epilogue, LinearSpec, PoolSpec, QParams, QuantizeSpec
from tvm_backend.lowering import pipeline_for

BYTES, SIGNED = QParams(0.1, 0, 0, 255, "uint8"), QParams(0.2, -3, -128, 127, "int8")
ADDED = Epilogue(residual=SIGNED, outputs=(SIGNED, BYTES))
SPECS = {
    "padded": ConvSpec(None, 14, 14, 64, 64, (3, 3), BYTES, ADDED, padding=(1, 1, 1, 1)),
    "strided": ConvSpec(None, 28, 28, 64, 32, (1, 1), SIGNED, Epilogue(outputs=(SIGNED,)), stride=(2, 2)),
    "guarded": ConvSpec(None, 28, 28, 128, 128, (3, 3), BYTES, Epilogue(), padding=(1, 1, 1, 1)),
    "depthwise": ConvSpec(
        2, 8, 8, 64, 64, (3, 3), BYTES, Epilogue(outputs=(BYTES,)), padding=(1, 1, 1, 1), groups=64
    ),
    "linear": LinearSpec(None, 40, 30, BYTES, Epilogue()),
    "pool": PoolSpec("max", None, 8, 8, 32, (3, 3), (2, 2), BYTES, Epilogue(outputs=(BYTES,))),
    "quantize": QuantizeSpec(None, (24,), (BYTES,)),
}


@pytest.mark.parametrize("processor", ["sapphirerapids", "haswell", "x86-64-v2"])
@pytest.mark.parametrize("name", SPECS)
def test_a_kernel_is_the_same_object(name: str, processor: str, tmp_path: Path) -> None:
    target = Target({"kind": "llvm", "mcpu": processor})
    function = lower(SPECS[name], target).generator.build("kernel")
    assert pipeline_for(function) != "default"
    made = []
    for pipeline in ("default", pipeline_for(function)):
        built = tvm.tirx.build(tvm.IRModule({"kernel": function}), target=target, pipeline=pipeline)
        built.write_to_file(str(tmp_path / "kernel.o"))
        made.append((tmp_path / "kernel.o").read_bytes())
    assert made[0] == made[1]


def test_what_tvm_schedules_takes_all_of_its_passes() -> None:
    from tvm_backend.kernels.cluster_affine import kernel

    function = kernel.prim_func("cat::cluster_affine", n_classes=4, n_clusters=2, n_components=2)
    assert pipeline_for(function) == "default"
