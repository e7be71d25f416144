"""Rows measured in pieces become one table with ratios."""

from __future__ import annotations

from benchmarks.inference import merged, with_ratios


def row(peer, precision, **more):
    return {"peer": peer, "model": "resnet20", "batch": 1, "precision": precision, **more}


def test_newer_rows_replace_older_ones_and_ours_come_first():
    old = [row("onnxruntime", "int8", ms=2.0), row("cat-ptq", "w8a8", reason="no linker")]
    new = [row("cat-ptq", "w8a8", ms=1.0), row("cat-ptq", "w4a4", ms=0.5) | {"model": "resnet18"}]
    assert merged(old, new) == [new[0], old[0], new[1]]


def test_layers_are_told_apart_by_their_number():
    layers = [
        {"model": "resnet20", "batch": 1, "precision": "w8a8", "number": i, "us": us}
        for i, us in enumerate((3, 4))
    ]
    again = [{**layers[1], "us": 5}]
    assert [layer["us"] for layer in merged(layers, again)] == [3, 5]


def test_ratios_are_of_the_same_model_and_batch():
    rows = [
        row("cat-ptq", "w8a8", ms=1.0, vs_openvino_int8=9.0),
        row("onnxruntime", "int8", ms=3.0),
        row("onnxruntime", "fp32", ms=6.0),
        row("onnxruntime", "int8", ms=40.0) | {"batch": 16},
        row("openvino", "int8", reason="not installed"),
    ]
    found = with_ratios(rows)
    assert [entry.get("vs_ort_int8") for entry in found] == [3.0, 1.0, 0.5, 1.0, None]
    # A ratio to what was not measured, or no longer is, does not stay.
    assert all("vs_openvino_int8" not in entry for entry in found)


def test_rows_of_one_instruction_set_are_compared_with_each_other():
    rows = [row("cat-ptq", "w8a8", ms=1.0), row("openvino", "int8", ms=2.0)]
    capped = [{**entry, "ms": 10 * entry["ms"], "isa": "avx2"} for entry in rows] + [
        row("cat-ptq", "w4a4", ms=1.0, isa="avx512bw")
    ]
    found = with_ratios(merged(rows, capped))
    assert len(found) == 5
    ours = {entry.get("isa"): entry.get("vs_openvino_int8") for entry in found if entry["peer"] == "cat-ptq"}
    assert ours == {None: 2.0, "avx2": 2.0, "avx512bw": None}
