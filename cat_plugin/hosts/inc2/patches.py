"""Every patch of Neural Compressor's 2.x APIs, done by :func:`attach` and undone by :func:`detach`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from cat_plugin.errors import CATError
from cat_plugin.hosts._patching import Patches
from cat_plugin.hosts.inc2 import yaml as inc2_yaml
from cat_plugin.hosts.inc2.algorithm import HostState, configurations, converted, quantize, stop
from cat_plugin.hosts.inc2.options import plain, take

__all__ = ["attach", "detach"]

_patches = Patches()
_SAMPLES = 1024
# Errors of strategies that ran, for the functions that the host returns from.
_raised: list[Exception] = []


def _asked(recipes: Any) -> bool:
    return bool(recipes) and bool(recipes.get("cat") or recipes.get("cat_args") is not None)


def _settings(strategy: Any) -> tuple[Any, Any]:
    """The recipes of a strategy, of either API, and the object that carries them."""
    if hasattr(strategy, "config"):
        return getattr(strategy.config, "recipes", None), strategy.config
    return getattr(strategy.cfg.quantization, "recipes", None), strategy.cfg


def _traverse(original: Callable[..., Any]) -> Callable[..., Any]:
    def traverse(self: Any) -> Any:
        recipes, carrier = _settings(self)
        if not _asked(recipes):
            return original(self)
        state: HostState | None = getattr(self.adaptor, "_cat_state", None)
        try:
            if state is None:
                sizes = [int(size) for size in getattr(self, "calib_sampling_size_lst", None) or [0]]
                state = HostState(
                    plain(recipes.get("cat_args")), getattr(carrier, "cat_run", None), max(_SAMPLES, *sizes)
                )
                self.adaptor._cat_state = state
                self.adaptor.quantize = functools.partial(
                    quantize, state, self.adaptor, self.adaptor.quantize
                )
            self.next_tune_cfg = functools.partial(configurations, state, self.next_tune_cfg)
            self._tune_cfg_converter = functools.partial(converted, state, self._tune_cfg_converter)
            if state.run is not None:
                self.stop = functools.partial(stop, state.run, self.stop)
            return original(self)
        except Exception as error:
            # The host prints whatever is raised here and returns None. What came from CAT is raised again
            # where the host returns; the rest stays with the host.
            if isinstance(error, CATError) or (state is not None and error is state.error):
                self._cat_error = error
                _raised.append(error)
            raise

    return traverse


def _raising(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_best_qmodel(self: Any) -> Any:
        error = getattr(self, "_cat_error", None)
        if error is not None:
            raise error
        return original(self)

    return get_best_qmodel


def _fit(original: Callable[..., Any]) -> Callable[..., Any]:
    def fit(*args: Any, **kwargs: Any) -> Any:
        _raised.clear()
        try:
            result = original(*args, **kwargs)
            if _raised:
                raise _raised[-1]
            return result
        finally:
            _raised.clear()

    return fit


def _execute(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute(self: Any) -> Any:
        result = original(self)
        error = getattr(self.strategy, "_cat_error", None)
        if error is not None:
            raise error
        return result

    return execute


def _recipes_property(original: property) -> property:
    """The host's ``recipes``, which drops what it does not know, with CAT's keys put back."""
    setter = original.fset
    assert setter is not None

    def fset(self: Any, recipes: Any) -> None:
        setter(self, recipes)
        if isinstance(recipes, Mapping) and {"cat", "cat_args"} & set(recipes):
            self._recipes.update(take(recipes))

    return property(original.fget, fset, original.fdel, original.__doc__)


_properties: list[tuple[type, str, property]] = []


def _extend_recipes(config: ModuleType) -> None:
    for owner in vars(config).values():
        original = vars(owner).get("recipes") if isinstance(owner, type) else None
        known = any(owner is done for done, *_ in _properties)
        if isinstance(original, property) and original.fset is not None and not known:
            setattr(owner, "recipes", _recipes_property(original))  # noqa: B010
            _properties.append((owner, "recipes", original))


def attach(host_module: ModuleType) -> None:
    """Extend a module of the host that has just been imported."""
    name = host_module.__name__
    if name == "neural_compressor.config":
        _extend_recipes(host_module)
    elif name == "neural_compressor.strategy.strategy":
        _patches.replace(host_module.TuneStrategy, "traverse", _traverse, ("self",))
        _patches.replace(host_module.TuneStrategy, "get_best_qmodel", _raising, ("self",))
    elif name == "neural_compressor.experimental.strategy.strategy":
        _patches.replace(host_module.TuneStrategy, "traverse", _traverse, ("self",))
    elif name == "neural_compressor.quantization":
        _patches.replace(host_module, "fit", _fit, ("model", "conf"))
    elif name == "neural_compressor.experimental.quantization":
        _patches.replace(host_module.Quantization, "execute", _execute, ("self",))
    elif name == "neural_compressor.conf.config":
        inc2_yaml.restore()
        inc2_yaml.extend(host_module.schema, _patches)
        _patches.replace(host_module.Conf, "_read_cfg", inc2_yaml.read_cfg, ("self", "cfg_fname"))


def detach() -> None:
    """Undo every :func:`attach`."""
    _patches.undo()
    inc2_yaml.restore()
    while _properties:
        owner, name, original = _properties.pop()
        setattr(owner, name, original)
