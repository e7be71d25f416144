"""Neural Compressor 2.x: the Python and the YAML API, and every patch of them.

After ``import cat_plugin`` the host takes, in Python,
``PostTrainingQuantConfig(recipes={"cat": True, "cat_args": {...}})`` and in YAML ``algorithm: cat`` (or
``algorithm: {cat: {...}}``, or ``recipes: {cat: true, cat_args: {...}}``) under ``quantization``.

A strategy that finds CAT in its recipes gets three functions of its own instance replaced while it
runs: the adaptor's ``quantize`` (which then returns a corrected model, wherever the host calls it:
in a trial, when it recovers the best one, without tuning), the generator of configurations (so that each
is tried with every configuration of CAT), and the converter in between (which carries CAT's options).
Options of the low-bit engine run that engine in place of the host's int8.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError, HostError
from cat_plugin.hosts._patching import Patches
from cat_plugin.hosts.inc2 import yaml as inc2_yaml
from cat_plugin.hosts.inc2.options import candidates, plain, take
from cat_plugin.recipe import options

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.hosts.pipeline import TuningSession
    from cat_plugin.recipe.tuning import TuningRun

__all__ = ["attach", "detach"]

_log = logging.getLogger("cat_plugin")
_patches = Patches()
_PARAMS = "cat_params"
_SAMPLES = 1024
# Errors of strategies that ran, for the functions that the host returns from.
_raised: list[Exception] = []
_NO_BASE: dict[str, Any] = {"static_quant": {}}


class _State:
    """What one tuning run of the host needs; kept on the adaptor, which its strategies share."""

    def __init__(self, args: Any, run: TuningRun | None, samples: int) -> None:
        from cat_plugin.hosts.pipeline import TuningSession

        self.candidates, self.engine = candidates(args)
        self.run = run
        self.samples = samples
        self.session: TuningSession = TuningSession()
        self.current: dict[str, Any] | None = None
        self.exhausted = False
        self.trial = 0
        self.error: Exception | None = None
        self.wrappers: dict[str, Any] = {}


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
        state: _State | None = getattr(self.adaptor, "_cat_state", None)
        try:
            if state is None:
                sizes = [int(size) for size in getattr(self, "calib_sampling_size_lst", None) or [0]]
                state = _State(
                    plain(recipes.get("cat_args")), getattr(carrier, "cat_run", None), max(_SAMPLES, *sizes)
                )
                self.adaptor._cat_state = state
                self.adaptor.quantize = functools.partial(
                    _quantize, state, self.adaptor, self.adaptor.quantize
                )
            self.next_tune_cfg = functools.partial(_configurations, state, self.next_tune_cfg)
            self._tune_cfg_converter = functools.partial(_converted, state, self._tune_cfg_converter)
            if state.run is not None:
                self.stop = functools.partial(_stop, state.run, self.stop)
            return original(self)
        except Exception as error:
            # The host prints whatever is raised here and returns None. What came from CAT is raised again
            # where the host returns; the rest stays with the host.
            if isinstance(error, CATError) or (state is not None and error is state.error):
                self._cat_error = error
                _raised.append(error)
            raise

    return traverse


def _configurations(state: _State, original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The host's configurations, each once for every configuration of CAT.

    The engine has nothing to do with them, and a recipe for both generations means the first one; then
    there is only one round.
    """
    one_round = state.engine or state.run is not None
    if one_round and state.exhausted:
        return
    source = original()
    while True:
        # While the host's generator thinks, it may quantize for itself; that is not to be corrected.
        state.current = None
        configuration = next(source, None)
        if configuration is None:
            return
        for params in state.candidates:
            if state.run is not None and state.run.trials and state.run.done():
                state.exhausted = True
                return
            state.current = params
            yield configuration
        if one_round:
            state.current = None
            state.exhausted = True
            return


def _stop(run: TuningRun, original: Callable[..., Any], *args: Any) -> bool:
    """The host's bookkeeping, and the criterion of the recipe that it runs for."""
    original(*args)
    return run.done()


def _converted(state: _State, original: Callable[[Any], Any], configuration: Any) -> Any:
    converted = original(configuration)
    if state.current is not None:
        converted["recipe_cfgs"] = {**converted.get("recipe_cfgs", {}), _PARAMS: state.current}
    return converted


def _rewrapped(template: Any, corrected: nn.Module) -> Any:
    """The host's wrapper around a corrected model, with everything that `template` knows beside its model."""
    import torch

    wrapper = type(template)(corrected, **(template.kwargs or {}))
    blank = vars(torch.nn.Module())
    for name, value in vars(template).items():
        if name not in blank and name != "_cat_wrapped":
            wrapper.__dict__[name] = value
    if isinstance(template.fp32_model, torch.nn.Module):
        wrapper.fp32_model = template.fp32_model
    return wrapper


def _quantize(state: _State, *args: Any) -> Any:
    """:func:`_corrected`, remembering that an error came out of it."""
    try:
        return _corrected(state, *args)
    except Exception as error:
        state.error = error
        raise


def _corrected(
    state: _State,
    adaptor: Any,
    original: Callable[..., Any],
    tune_cfg: dict[str, Any],
    model: Any,
    dataloader: Any,
    q_func: Any = None,
) -> Any:
    """The adaptor's ``quantize``, followed by the correction when the configuration asks for it."""
    from cat_plugin.hosts.inc2.loader import CallLoader, feed
    from cat_plugin.hosts.pipeline import CalibrationRecord, quantize_and_correct
    from cat_plugin.hosts.recording import Replay, record_run

    params = (tune_cfg.get("recipe_cfgs") or {}).get(_PARAMS)
    if params is None:
        return original(tune_cfg, model, dataloader, q_func)
    reference: nn.Module = model._model
    if q_func is None and dataloader is None:
        raise HostError(
            "CAT fits its correction to calibration data: pass calib_dataloader (or calib_func), also where the "
            "approach needs none"
        )
    run_fn: Any = q_func
    if q_func is None:
        held = isinstance(dataloader, CallLoader)
        run_fn = (
            Replay(dataloader.calls)
            if held
            else functools.partial(feed, dataloader=dataloader, samples=state.samples)
        )
    source = (q_func, dataloader)
    record = state.session.record(
        reference, source, lambda: CalibrationRecord(*record_run(reference, run_fn))
    )
    state.trial += 1
    state.session.label = f"trial {tune_cfg.get('trial_number', state.trial)}"
    detail = "" if state.engine else repr(sorted(tune_cfg["op"].items(), key=repr))

    def quantize_base() -> nn.Module:
        wrapper = original(copy.deepcopy(tune_cfg), model, dataloader, q_func)
        state.wrappers.clear()
        state.wrappers[detail] = wrapper
        inner: nn.Module = wrapper._model
        return inner

    if state.engine:
        corrected = quantize_and_correct(
            options.with_defaults(params), reference, record, None, state.session
        )
        adaptor.pre_optimized_model = model
        template = model
    else:
        corrected = quantize_and_correct(
            options.with_defaults({**params, "base": _NO_BASE}),
            reference,
            record,
            quantize_base,
            state.session,
            detail,
        )
        from cat_plugin.torch_compat import PACKED_MODULES

        template = state.wrappers.get(detail, model)
        if any(type(module).__module__.startswith(PACKED_MODULES) for module in corrected.model.modules()):
            corrected.export_obstacle = (
                "the int8 model of the 2.x API computes with torch's packed int8 kernels, which torch.export does not "
                "take. Quantize with the low-bit engine (w_bits: 8, a_bits: 8), or with static int8 of 3.9 or later"
            )
    wrapper = _rewrapped(template, corrected)
    if wrapper.q_config is None or state.engine:
        wrapper.q_config = copy.deepcopy(tune_cfg)
        wrapper.tune_cfg = copy.deepcopy(tune_cfg)
    wrapper.is_quantized = True
    from cat_plugin.serialization.saving import save

    # The host's own save() pickles a state dict of the inner model's keys, which its load() then looks for in vain.
    wrapper.__dict__["save"] = MethodType(save, wrapper)
    return wrapper


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
