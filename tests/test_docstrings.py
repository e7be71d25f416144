"""What docstrings promise is there: every listed parameter exists and is described, every public name is in ``__all__``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path.relative_to(ROOT).as_posix()
    for package in ("cat_plugin", "tvm_backend")
    for path in sorted((ROOT / package).rglob("*.py"))
]
#: Sections whose entries are ``name : type`` with an indented description below.
_DESCRIBED = ("Parameters", "Other Parameters", "Attributes")
_HEADING = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}$", re.MULTILINE)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sections(docstring: str) -> dict[str, str]:
    """The text of each section of a docstring."""
    parts = _HEADING.split(docstring)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> Iterator[tuple[list[str], str]]:
    """The names that each entry of a section describes, without stars, and the text below them."""
    for entry in re.split(r"\n(?=\S)", section.strip("\n")):
        head, _, text = entry.partition("\n")
        yield [name.strip().lstrip("*\\") for name in head.partition(" : ")[0].split(",")], text.strip()


def public(node: ast.AST) -> bool:
    return isinstance(node, Definition) and not node.name.startswith("_")


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Every public function, class and method of a module, with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if public(node):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = function.args
    given = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    return {argument.arg for argument in given if argument is not None}


def accepted(node: Definition) -> set[str] | None:
    """What a call of it may name; None where it may be a base class's."""
    if isinstance(node, FUNCTIONS):
        return parameters(node)
    for child in node.body:
        if isinstance(child, FUNCTIONS) and child.name == "__init__":
            return parameters(child)
    return (
        None if node.bases else {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}
    )


def findings(source: str) -> list[str]:
    """What is wrong with the docstrings of a module."""
    found = []
    for name, node in definitions(ast.parse(source)):
        parts = sections(ast.get_docstring(node) or "")
        for title in _DESCRIBED:
            for names, text in entries(parts[title]) if title in parts else ():
                if not text:
                    found.append(f"{name}: {', '.join(names)} is not described")
                known = None if title == "Attributes" else accepted(node)
                found += [f"{name}: {each} is no parameter" for each in names if known and each not in known]
    return found


def exported(tree: ast.Module) -> list[str] | None:
    """The names in ``__all__``; None without one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [element.value for element in node.value.elts]
    return None


def unlisted(source: str) -> list[str]:
    """What is wrong with a module's ``__all__``."""
    tree = ast.parse(source)
    listed = exported(tree)
    defined = [node.name for node in tree.body if public(node)]
    if listed is None:
        return [f"no __all__, and {', '.join(defined)}"] if defined else []
    known = set(defined)
    conditional = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    for node in [*tree.body, *conditional]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            known |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return [f"{name} is in __all__ and does not exist" for name in listed if name not in known] + [
        f"{name} is public and not in __all__" for name in defined if name not in listed
    ]


@pytest.mark.parametrize("file", FILES)
def test_entries_are_described_and_parameters_exist(file: str) -> None:
    assert findings((ROOT / file).read_text()) == []


@pytest.mark.parametrize("file", FILES)
def test_all_is_true(file: str) -> None:
    assert unlisted((ROOT / file).read_text()) == []


SAMPLE = '''
__all__ = ["gone", "kept"]

def kept(a, *rest, b=1):
    """Do it.

    Parameters
    ----------
    a : int
    *rest
        More.
    c, b : int
        One of them.

    Returns
    -------
    int
    """

class Added:
    """Something.

    Attributes
    ----------
    x : int
    """
'''


def test_what_is_wrong_is_found() -> None:
    assert findings(SAMPLE) == [
        "kept: a is not described",
        "kept: c is no parameter",
        "Added: x is not described",
    ]
    assert unlisted(SAMPLE) == ["gone is in __all__ and does not exist", "Added is public and not in __all__"]
