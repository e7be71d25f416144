"""The commands of ``cat-ptq``, one file each; importing them registers them, in the order of ``cat-ptq --help``."""

from __future__ import annotations

# isort: off
from cat_plugin.cli import recipe  # noqa: F401
from cat_plugin.cli import quantize  # noqa: F401
from cat_plugin.cli import evaluate  # noqa: F401
from cat_plugin.cli import report  # noqa: F401
from cat_plugin.cli import compile  # noqa: F401
from cat_plugin.cli import benchmark  # noqa: F401
from cat_plugin.cli import inspect  # noqa: F401
from cat_plugin.cli import doctor  # noqa: F401
