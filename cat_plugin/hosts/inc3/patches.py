"""Every patch of Neural Compressor's 3.x API, done by :func:`attach` and undone by :func:`detach`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import neural_compressor.torch.quantization as host
from neural_compressor.common import base_config
from neural_compressor.common.base_config import BaseConfig, ComposableConfig, config_registry
from neural_compressor.torch.utils.utility import algos_mapping

from cat_plugin.hosts._patching import Patches
from cat_plugin.hosts.inc3.algorithm import cat_entry
from cat_plugin.hosts.inc3.config import FRAMEWORK, NAME, CATConfig, as_base
from cat_plugin.hosts.inc3.tuning import init_tuning_with_cat

__all__ = ["attach", "detach"]

_log = logging.getLogger("cat_plugin")
_patches = Patches()


def _add(original: Callable[..., Any]) -> Callable[..., Any]:
    def __add__(self: BaseConfig, other: BaseConfig) -> BaseConfig:
        if isinstance(other, CATConfig) and not isinstance(self, CATConfig):
            return other + self
        return original(self, other)

    return __add__


def _from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: type, config_dict: Any, config_registry: Any) -> BaseConfig:
        if not isinstance(config_dict, Mapping) or NAME not in config_dict:
            return original(cls, config_dict, config_registry)
        others = {name: params for name, params in config_dict.items() if name != NAME}
        config = CATConfig.from_dict(config_dict[NAME])
        return config + as_base(others) if others else config

    return from_dict


def _without_cat(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_all_config_cls_by_fwk_name(cls: type, fwk_name: str) -> list[type[BaseConfig]]:
        # The host makes its default tuning set of everything registered; CAT is only tried when asked for.
        return [config for config in original(cls, fwk_name) if config is not CATConfig]

    return get_all_config_cls_by_fwk_name


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        from cat_plugin.serialization import saving

        given = {**dict(zip(("model_name_or_path", "original_model"), args, strict=False)), **kwargs}
        if saving.is_saved(given.get("model_name_or_path")):
            return saving.load(given["model_name_or_path"], model=given.get("original_model"))
        return original(*args, **kwargs)

    return load


def attach(host_module: ModuleType = host) -> None:
    """Register with the host and extend it; a second call does nothing."""
    if algos_mapping.get(NAME) is cat_entry:
        return
    base_config.register_config(framework_name=FRAMEWORK, algo_name=NAME)(CATConfig)
    importlib.import_module("neural_compressor.torch.utils").register_algo(NAME)(cat_entry)
    autotune_file = importlib.import_module("neural_compressor.torch.quantization.autotune")
    _patches.replace(BaseConfig, "__add__", _add, ("self", "other"))
    _patches.replace(ComposableConfig, "__add__", _add, ("self", "other"))
    _patches.replace(ComposableConfig, "from_dict", _from_dict, ("cls", "config_dict", "config_registry"))
    _patches.replace(
        base_config.ConfigRegistry, "get_all_config_cls_by_fwk_name", _without_cat, ("cls", "fwk_name")
    )
    _patches.replace(autotune_file, "init_tuning", init_tuning_with_cat, ("tuning_config",))
    loading = importlib.import_module("neural_compressor.torch.quantization.save_load_entry")
    for place in (loading, host):
        # Its parameters are hidden by a decorator of the host's.
        _patches.replace(place, "load", _load, ())
    _log.debug("registered with %s", host_module.__name__)


def detach() -> None:
    """Undo :func:`attach`."""
    _patches.undo()
    if algos_mapping.get(NAME) is cat_entry:
        del algos_mapping[NAME]
    registered = config_registry.get_all_configs().get(FRAMEWORK, {})
    if registered.get(NAME, {}).get("cls") is CATConfig:
        del registered[NAME]
