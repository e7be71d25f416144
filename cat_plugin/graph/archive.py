"""What may stand in ``model.pt2``: checked before torch opens it.

``torch.export.load`` unpickles tensors that the archive says are pickled, loads compiled libraries that lie in it, and
evaluates expressions of sizes and guards as Python.  The graphs of this project need none of the first two and very
little of the third, so an archive that has more is refused: what is left for torch to read is plain JSON, raw tensors,
the names of operators and expressions made of sizes and integers.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cat_plugin.errors import BundleError

__all__ = ["check_archive"]

_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": "weight",
    "data/constants/model_constants_config.json": "tensor",
}
_ENTRIES = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten\.(?!from_file)|(quantized|quantized_decomposed|prims|cat|torchao|onednn|torchvision)\.)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_[a-z]+|math\.[a-z]\w*"
    r"|_operator\.(i?(add|sub|mul|truediv|floordiv|mod|pow|matmul|and_|or_|xor)|neg|pos|abs|not_|eq|ne|lt|le|gt|ge|getitem)"
)
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_WORD = re.compile(r"\w[\w. ]*")
_LONGEST = 2000

# Functions of sizes that torch writes: sympy's own and those of torch.utils._sympy.functions.
_FUNCTIONS = frozenset(
    [
        "Symbol",
        "Integer",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CeilDiv",
        "CleanDiv",
        "IntTrueDiv",
        "ModularIndexing",
        "Where",
        "FloorToInt",
        "CeilToInt",
        "TruncToInt",
        "RoundToInt",
        "ToFloat",
        "floor",
        "ceiling",
        "Abs",
        "And",
        "Or",
        "Not",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
    ]
)
_METHODS = frozenset(["size", "stride", "storage_offset", "dim", "isnan"])
_NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Compare,
    ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def check_archive(stream: IO[bytes], path: Path) -> None:
    """Refuse an archive that would make torch do more than build a graph.

    Parameters
    ----------
    stream : binary file
        The archive.
    path : pathlib.Path
        Its name, for messages.

    Raises
    ------
    BundleError
        Naming what does not belong there.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            prefix = _check_entries(archive, path)
            for config, kind in _CONFIGS.items():
                _check_payload(_json(archive, prefix + config, path), kind, path)
            _check_graph(_json(archive, prefix + _GRAPH, path), path)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BundleError(
            f"{path} is not an archive of torch.export ({error}); export the model again"
        ) from error


def _refuse(path: Path, what: str) -> BundleError:
    return BundleError(
        f"{path} holds {what}, which no exported graph needs: it is not loaded; export the model again"
    )


def _check_entries(archive: zipfile.ZipFile, path: Path) -> str:
    """Names, sizes and compression of the entries; the name of the folder that they are in."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    prefix = names[0].partition("/")[0] + "/" if names else ""
    if len(set(names)) != len(names):
        raise _refuse(path, "two entries of one name")
    for entry in entries:
        name = entry.filename
        inside = name.removeprefix(prefix)
        if not name.startswith(prefix) or not _ENTRIES.fullmatch(inside):
            raise _refuse(path, f"the entry {name!r:.100}")
        # Stored as it is: nothing here can be small on disk and large in memory.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _refuse(path, f"the compressed entry {name!r}")
        if inside == _SAMPLES and entry.file_size:
            raise _refuse(path, "pickled sample inputs")
    missing = {_GRAPH, *_CONFIGS} - {name.removeprefix(prefix) for name in names}
    if missing:
        raise BundleError(f"{path} has no entry {min(missing)}; export the model again")
    return prefix


def _json(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    try:
        return json.loads(archive.read(name))
    except RecursionError as error:
        raise BundleError(f"{path}: {name} is nested too deeply; export the model again") from error


def _check_payload(config: Any, kind: str, path: Path) -> None:
    """Tensors are raw bytes of the archive's own entries."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise BundleError(f"{path} does not say where its tensors lie; export the model again")
    for name, entry in entries.items():
        place = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(place, str) or not re.fullmatch(rf"{kind}_\d+", place):
            raise _refuse(path, f"an object in the place of the tensor {name!r:.100}")
        if entry.get("use_pickle") is not False:
            raise _refuse(path, f"the pickled tensor {name!r:.100}")


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a parsed JSON file, without recursion."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield item
            # Notes for people: where in the source a node came from.
            left.extend(part for key, part in item.items() if key != "metadata")
        elif isinstance(item, list):
            left.extend(item)


def _check_graph(graph: Any, path: Path) -> None:
    """Operators by name, names that are names, and expressions that only compute sizes."""
    if not isinstance(graph, dict):
        raise BundleError(f"{path} holds no graph; export the model again")
    guards = graph.get("guards_code", [])
    for guard in guards if isinstance(guards, list) else [guards]:
        _check_expression(guard, path)
    for item in _dictionaries(graph):
        target = item.get("target")
        if (
            "inputs" in item
            and target is not None
            and not (isinstance(target, str) and _OPERATOR.fullmatch(target))
        ):
            raise _refuse(path, f"a call of {target!r:.100}")
        # Torch writes the names of values into the source of the graph's forward function.
        for key in ("name", "graph_name", "module_name"):
            name = item.get(key)
            if isinstance(name, str) and name and not _NAME.fullmatch(name):
                raise _refuse(path, f"the name {name!r:.100}")
        if "expr_str" in item:
            _check_expression(item["expr_str"], path)


def _check_expression(text: Any, path: Path) -> None:
    """Read an expression of sizes and integers: no attribute, call, text or power beyond what these need."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise _refuse(path, f"the expression {text!r:.100}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refuse(path, f"the expression {text!r:.100}") from error
    if not all(_harmless(node) for node in ast.walk(tree)):
        raise _refuse(path, f"the expression {text!r:.100}")


def _harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):
            return function.attr in _METHODS
        if not isinstance(function, ast.Name) or function.id not in _FUNCTIONS:
            return False
        # A tower of powers would take for ever to evaluate.
        return function.id != "Pow" or (len(node.args) == 2 and _small(node.args[1]))
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.LShift):
            return False
        return not isinstance(node.op, ast.Pow) or _small(node.right)
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS or node.attr == "inf"
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _WORD.fullmatch(node.value) is not None
        return isinstance(node.value, bool | int | float)
    return isinstance(node, _NODES)


def _small(node: ast.expr) -> bool:
    """Whether an exponent is a small number."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return _small(node.args[0])
    if isinstance(node, ast.UnaryOp):
        return _small(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) <= 8
