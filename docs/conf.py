"""How the site is built: ``tox run -e docs``, or ``sphinx-build -W docs site``.

PyTorch, TVM and Neural Compressor are not needed: the API reference is read from modules in which they are stand-ins.
The Markdown pages read on a code host as they are; what only a site needs is added here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from sphinx.ext.autodoc.mock import mock

import cat_plugin
import cat_plugin.cluster_affine.estimator  # before torch has a stand-in, which scipy would take for it

project = "cat-ptq"
version = release = cat_plugin.__version__
copyright = "the cat-ptq authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "svg_math", "gallery"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cat-ptq {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "svg"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings name parameters in single backticks.
default_role = "literal"
autodoc_mock_imports = ["neural_compressor", "torch", "torchao", "tvm", "tvm_ffi"]
with mock(autodoc_mock_imports):
    import tvm

    tvm.__version__ = "0.27.0"  # the backend asks which release it has before it does anything
    import tvm_backend.build  # noqa: F401

autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

NAVIGATION = {
    "Start": [
        "quickstart",
        "examples/digits",
        "examples/cifar_resnet20",
        "examples/vision_transformer",
        "examples/text_encoder",
        "examples/serving",
        "examples/tour",
    ],
    "Use": [
        "hosts",
        "choosing",
        "transformers",
        "ptq",
        "estimator",
        "bundle",
        "onnx",
        "pytorch",
        "cli",
        "gallery",
        "deploy",
        "security",
        "troubleshooting",
    ],
    "Understand": ["method"],
    "Extend": [
        "extending/kernel",
        "extending/mode",
        "extending/reconstruction",
        "extending/host",
        "testing",
        "contributing",
    ],
    "Look up": [
        "api/cat_plugin",
        "api/cluster_affine",
        "api/ptq",
        "api/graph",
        "api/tvm_backend",
        "api/errors",
    ],
    "Measurements": ["benchmarks/*"],
}
"""The side bar: headings, and the pages under each."""

OUTSIDE = {
    "../README.md": "quickstart.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../benchmarks/README.md": "benchmarks/running.md",
}
"""Pages that lie outside docs/ in the repository, and where the site has them."""


def _for_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Point links to what the site has, and give the landing page the side bar."""
    up = "../" * page.count("/")
    for there, here in OUTSIDE.items():
        source[0] = source[0].replace(f"]({up}{there}", f"]({up}{here}")
    if page == "index":
        for caption, pages in NAVIGATION.items():
            lines = ["```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *pages, "```"]
            source[0] += "\n" + "\n".join(lines) + "\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", _for_the_site)
