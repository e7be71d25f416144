"""``cat-ptq``: the command line."""

from __future__ import annotations

from cat_plugin.cli.main import main

__all__ = ["main"]
