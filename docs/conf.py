"""Sphinx configuration."""

from __future__ import annotations

from cat_plugin import __version__

project = "cat-ptq"
author = "The cat-ptq authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"cat-ptq {release}"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["neural_compressor"]
napoleon_use_rtype = False
napoleon_google_docstring = False
suppress_warnings = ["myst.xref_missing"]
