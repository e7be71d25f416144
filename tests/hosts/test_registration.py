"""Registering when the host is imported, before or after; undoing it; leaving the host alone."""

from __future__ import annotations

import sys

import pytest

import cat_plugin
from cat_plugin.errors import HostError

from .conftest import INC, needs_inc3
from .fresh import bare, fresh

needs_host = pytest.mark.skipif(INC == (0, 0), reason="no Neural Compressor is installed")


ORDERS = {
    "plugin first": "import cat_plugin; import neural_compressor.torch.quantization as q",
    "host first": "import neural_compressor.torch.quantization as q; import cat_plugin",
    "through CATConfig": "from cat_plugin import CATConfig; import neural_compressor.torch.quantization as q",
    "host's functions bound before": (
        "from neural_compressor.torch.quantization import autotune, quantize; import cat_plugin"
    ),
}


@needs_inc3
@pytest.mark.parametrize("order", list(ORDERS))
def test_order_of_imports(order):
    code = f"""
        {ORDERS[order]}
        from neural_compressor.torch.utils.utility import algos_mapping
        from neural_compressor.common.base_config import BaseConfig, config_registry
        print(config_registry.get_cls_configs()["torch"]["cat"].__name__, list(algos_mapping)[-1],
              BaseConfig.__add__.__qualname__)
    """
    run = bare if order == "plugin first" else fresh  # before PyTorch, too
    assert run(code)[-1].startswith("CATConfig cat ")


@needs_host
def test_importing_the_plugin_imports_nothing_heavy():
    code = """
        import sys, cat_plugin
        print([name for name in ("torch", "neural_compressor", "sklearn", "pydantic", "yaml") if name in sys.modules])
    """
    assert bare(code)[-1] == "[]"


@needs_host
def test_the_host_module_keeps_its_own_loader():
    """Tools that ask a module for its loader or resources must not meet ours."""
    code = """
        import cat_plugin, neural_compressor
        print(type(neural_compressor.__loader__).__name__, type(neural_compressor.__spec__.loader).__name__)
    """
    assert fresh(code)[-1] == "SourceFileLoader SourceFileLoader"


@needs_inc3
def test_unregister_undoes_everything():
    """What a snapshot of the host shows before the plugin is imported, it shows again afterwards."""
    code = """
        import neural_compressor.torch.quantization as q
        import neural_compressor.common.base_config as b
        import neural_compressor.common.base_tuning as t
        import neural_compressor.torch.utils.utility as u
        import sys
        autotune = sys.modules["neural_compressor.torch.quantization.autotune"]

        def snapshot():
            found = {}
            for owner in (q, b, t, u, autotune, b.BaseConfig, b.ComposableConfig, b.ConfigRegistry, t.TuningMonitor):
                for name, value in vars(owner).items():
                    found[getattr(owner, "__name__", str(owner)), name] = id(value)
            return found, list(u.algos_mapping), sorted(b.config_registry.get_cls_configs()["torch"])

        before = snapshot()
        import cat_plugin
        between = snapshot()
        cat_plugin.unregister()
        after = snapshot()
        print(before != between, {k for k in before[0] if before[0][k] != after[0].get(k)}, before[1:] == after[1:])
    """
    assert fresh(code)[-1] == "True set() True"


@needs_inc3
def test_register_again(registered):
    import neural_compressor.torch.quantization  # noqa: F401  (what the plugin waits for)
    from neural_compressor.torch.utils.utility import algos_mapping

    from cat_plugin.hosts import register

    assert "cat" in algos_mapping
    registered()
    assert "cat" not in algos_mapping
    register()
    register()
    assert "cat" in algos_mapping


@needs_inc3
def test_a_patch_of_somebody_else_survives(registered):
    import neural_compressor.common.base_config as base_config
    import neural_compressor.torch.quantization  # noqa: F401  (what the plugin waits for)

    ours = base_config.BaseConfig.__add__

    def theirs(self, other):
        return ours(self, other)

    base_config.BaseConfig.__add__ = theirs
    try:
        registered()
        assert base_config.BaseConfig.__add__ is theirs
    finally:
        base_config.BaseConfig.__add__ = ours.__cat_plugin_original__


@pytest.mark.skipif(INC >= (3, 0), reason="this release has a torch API")
def test_catconfig_without_a_3x_host():
    with pytest.raises(HostError, match=r"3\.x torch API"):
        cat_plugin.CATConfig  # noqa: B018


class TestHook:
    """The import hook, on a module of our own."""

    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "a_host_of_ours.py").write_text("value = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield "a_host_of_ours"
        sys.modules.pop("a_host_of_ours", None)

    def test_called_once_after_the_module_ran(self, module):
        from cat_plugin.hosts._import_hook import PostImportHook

        seen = []
        hook = PostImportHook({module: lambda m: seen.append(m.value)})
        hook.install()
        try:
            assert seen == []
            __import__(module)
            __import__(module)
            assert seen == [1]
        finally:
            hook.remove()

    def test_called_at_once_for_a_module_that_is_there(self, module):
        from cat_plugin.hosts._import_hook import PostImportHook

        __import__(module)
        seen = []
        hook = PostImportHook({module: lambda m: seen.append(m.value)})
        hook.install()
        hook.remove()
        assert seen == [1]

    def test_removed_hook_is_silent(self, module):
        from cat_plugin.hosts._import_hook import PostImportHook

        seen = []
        hook = PostImportHook({module: lambda m: seen.append(m.value)})
        hook.install()
        hook.remove()
        __import__(module)
        assert seen == []
        assert hook not in sys.meta_path

    def test_missing_module_is_still_missing(self):
        from cat_plugin.hosts._import_hook import PostImportHook

        hook = PostImportHook({"no_such_host_anywhere": lambda m: None})
        hook.install()
        try:
            with pytest.raises(ModuleNotFoundError):
                __import__("no_such_host_anywhere")
        finally:
            hook.remove()
