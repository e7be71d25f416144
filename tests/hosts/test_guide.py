"""The user's guide runs as written, on every release that has the API it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import INC

GUIDE = Path(__file__).parents[2] / "docs" / "hosts.md"
BLOCK = re.compile(r"^```(\{code-block\} )?(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[tuple[str, str]]]:
    """The blocks of each section, as (language, text); the text before the first heading is ''."""
    parts = re.split(r"^## (.*)$", GUIDE.read_text("utf-8"), flags=re.MULTILINE)
    names = ["", *parts[1::2]]
    bodies = [parts[0], *parts[2::2]]
    return {
        name: [(match[2], match[3]) for match in BLOCK.finditer(body)]
        for name, body in zip(names, bodies, strict=True)
    }


PAGES = {
    "3.x": (
        ["", "The 3.x API", "One recipe for both generations", "Saving, loading, handing over"],
        INC >= (3, 2),
    ),
    "recipe on 2.x": (
        ["", "One recipe for both generations", "Saving, loading, handing over"],
        (2, 0) <= INC < (3, 0),
    ),
    "2.x Python": (["", "The 2.x Python API"], (2, 0) <= INC < (3, 8)),
    "2.x YAML": (["", "The 2.x Python API", "The 2.x YAML API"], (2, 0) <= INC < (3, 0)),
}


@pytest.mark.parametrize("page", list(PAGES))
def test_guide(page, tmp_path, monkeypatch, registered):
    names, here = PAGES[page]
    if not here:
        pytest.skip(f"Neural Compressor {INC[0]}.{INC[1]} does not have what this part is about")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = sections()
    # A recipe's section stands on its own where the one before it is about another API.
    exec("import cat_plugin", namespace)
    ran = 0
    for name in names:
        for language, text in found[name]:
            if language == "yaml":
                file = re.match(r"# ([\w.]+)\n", text)
                assert file, "the first line of a YAML block names its file"
                Path(file[1]).write_text(text)
            else:
                exec(compile(text, f"{GUIDE.name}: {name}", "exec"), namespace)
                ran += 1
    assert ran >= 3
