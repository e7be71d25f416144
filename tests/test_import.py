"""What importing the package costs and touches."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cat_plugin


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import cat_plugin;"
        "heavy = {'torch', 'neural_compressor', 'tvm', 'sklearn', 'scipy', 'yaml', 'rich', 'numpy'};"
        "found = heavy & (set(sys.modules) - before); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve() -> None:
    assert {"CATConfig", "correct", "export_bundle", "load", "load_recipe", "save", "unregister"} <= set(
        cat_plugin.__all__
    )
    assert callable(cat_plugin.export_bundle)
    assert callable(cat_plugin.ptq.quantize)
    assert cat_plugin.cluster_affine.ClusterAffine
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cat_plugin.nothing  # type: ignore[attr-defined]
