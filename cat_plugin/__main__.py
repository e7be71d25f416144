"""``python -m cat_plugin``."""

from __future__ import annotations

import sys

from cat_plugin.cli import main

sys.exit(main())
