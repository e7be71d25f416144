"""What runtimes cannot take of a QDQ graph, or take without gaining by it: told before a file is written.

Tried with ONNX Runtime 1.32 and OpenVINO 2026.4 on x86; uneven zero points with ONNX Runtime 1.20, 1.25, 1.28, 1.30 and 1.31 too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from cat_plugin.errors import CATValueError
from cat_plugin.graph.onnx.quantizers import storage_bits
from cat_plugin.graph.onnx.writer import Writer, arguments_of

__all__ = ["RUNTIMES", "Note", "refusals", "runtime_notes"]

RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Note:
    """One thing to know about a graph before it is handed to a runtime.

    Attributes
    ----------
    text : str
        What it is and what to do.
    refused_by : tuple of str
        The runtimes that fail on it; empty where the result is right and only slower, or depends on the release.
    """

    text: str
    refused_by: tuple[str, ...] = ()


def runtime_notes(program: ExportedProgram, opset: int = 21) -> list[Note]:
    """Look through a QDQ graph for what runtimes cannot take.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is.
    opset : int, default 21
        That it is to be written in.

    Returns
    -------
    list of Note
    """
    writer = Writer(program, opset)
    narrow = four = 0
    uneven: list[str] = []
    for node in program.graph.nodes:
        if "quantized_decomposed.dequantize" not in str(node.target):
            continue
        given = arguments_of(node)
        bits = storage_bits(int(given["quant_min"]), int(given["quant_max"]), opset)
        narrow += bits == 2
        four += bits <= 4 and not writer.is_constant(given["input"])
        if bits == 8 and _feeds_convolution(node) and _differ(writer, given.get("zero_points")):
            uneven.append(node.name)
    notes = []
    if narrow:
        notes.append(
            Note(
                f"{narrow} tensors have ONNX's 2-bit types (opset {opset}): ONNX Runtime's default optimizations fail on "
                "them and OpenVINO cannot read them; opset 21 to 24 stores the same integers in 4 bits",
                RUNTIMES,
            )
        )
    if four:
        notes.append(
            Note(
                f"{four} activations have 4 bits or fewer: ONNX Runtime and OpenVINO compute such layers in floating "
                "point, right and no faster; quantize with a_bits=8 for speed there"
            )
        )
    if uneven:
        notes.append(
            Note(
                f"the 8-bit weights of {len(uneven)} convolutions have zero points that differ by channel, on which "
                "ONNX Runtime up to 1.25 fails with its default optimizations (1.28 and later compute them) and which "
                "TensorRT refuses; quantize with symmetric_weights=True for these"
            )
        )
    return notes


def refusals(notes: list[Note], runtime: str) -> list[str]:
    """The texts of what one runtime fails on.

    Raises
    ------
    CATValueError
        When nothing is known about that runtime.
    """
    if runtime not in RUNTIMES:
        raise CATValueError(f"runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}, or left out")
    return [note.text for note in notes if runtime in note.refused_by]


def _feeds_convolution(node: Node) -> bool:
    return any("aten.conv" in str(user.target) for user in node.users)


def _differ(writer: Writer, zero_points: object) -> bool:
    if not isinstance(zero_points, Node) or not writer.is_constant(zero_points):
        return False
    values = writer.tensor(zero_points)
    return bool((values != values.flatten()[0]).any())
