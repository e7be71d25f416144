"""Neural Compressor 3.x: ``CATConfig``, the ``cat`` algorithm, and every patch of that API.

Typical use, after ``import cat_plugin``::

    from neural_compressor.torch.quantization import quantize
    corrected = quantize(model, cat_plugin.CATConfig(w_bits=4, a_bits=4), run_fn=calibrate)

``CATConfig(base=RTNConfig(bits=4))``, ``RTNConfig(bits=4) + CATConfig()`` and
``{"rtn": {"bits": 4}, "cat": {}}`` correct an algorithm of the host instead. Whatever the spelling,
the host sees one algorithm called ``cat``, which runs the base through the host's own functions.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType, ModuleType
from typing import Any

from cat_plugin.errors import HostError, RecipeError

try:
    import neural_compressor.torch.quantization as _host
    from neural_compressor.common import base_config as _base_config
    from neural_compressor.common.base_config import BaseConfig, ComposableConfig, config_registry
    from neural_compressor.common.base_tuning import TuningMonitor
    from neural_compressor.common.utils import Mode
    from neural_compressor.torch.utils.utility import algos_mapping
except ImportError as error:
    raise HostError(
        f"CATConfig belongs to Neural Compressor's 3.x torch API, which cannot be imported here ({error}); install "
        "neural-compressor[pt]>=3.2, or with 2.x use PostTrainingQuantConfig(recipes={'cat': True, 'cat_args': {...}})"
    ) from error

import torch
from torch import nn

from cat_plugin.batches import gathered
from cat_plugin.calls import collect_logits
from cat_plugin.correction import CorrectedModule
from cat_plugin.hosts import is_registered
from cat_plugin.hosts._patching import Patches
from cat_plugin.hosts.config import FRAMEWORK, KEY, NAME, CATConfig, as_base
from cat_plugin.hosts.pipeline import CalibrationRecord, TuningSession, quantize_and_correct
from cat_plugin.hosts.recording import InputRecorder, record_run
from cat_plugin.recipe import options
from cat_plugin.recipe.criteria import Criterion
from cat_plugin.recipe.tuning import TuningRun

__all__ = ["CATConfig", "attach", "detach"]

_log = logging.getLogger("cat_plugin")
_patches = Patches()
_STATE = "_cat_state"


class _State:
    """What preparation leaves for conversion; shared by copies of the prepared model."""

    def __init__(self, reference: nn.Module | None, recorder: InputRecorder) -> None:
        self.reference = reference
        self.recorder = recorder

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return self


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy that keeps what exported modules lose when copied."""
    copied = copy.deepcopy(model)
    for name in ("_exported", "dynamic_shapes"):
        if hasattr(model, name) and not hasattr(copied, name):
            setattr(copied, name, getattr(model, name))
    return copied


def _check_exported(base: BaseConfig, model: nn.Module) -> None:
    if base.name == "static_quant" and not getattr(model, "_exported", False):
        raise HostError(
            "the base static_quant takes a model exported by neural_compressor.torch.export.export(model, "
            "example_inputs); export it first"
        )


def _usable(base: BaseConfig) -> BaseConfig:
    """A copy of a base that the host can run here."""
    base = copy.deepcopy(base)
    if getattr(base, "use_layer_wise", False) and importlib.util.find_spec("accelerate") is None:
        # The host's own default from 3.9 on; it then stops with an import error.
        _log.info(
            "%s: use_layer_wise needs the package accelerate, which is not installed; set to False", base.name
        )
        base.use_layer_wise = False
    return base


def _host_function(name: str) -> Callable[..., Any]:
    # Taken from its file when called, so that what others put in its place is respected. The package's
    # attribute of the same name is the function, not the file.
    function: Callable[..., Any] = getattr(
        importlib.import_module("neural_compressor.torch.quantization.quantize"), name
    )
    return function


def cat_entry(
    model: nn.Module,
    configs_mapping: Mapping[tuple[str, str], Any],
    *args: Any,
    mode: Mode = Mode.QUANTIZE,
    **kwargs: Any,
) -> nn.Module:
    """The algorithm as the host calls it, once for each of its modes."""
    config: CATConfig = configs_mapping[KEY]
    if isinstance(config.base, list) or options.has_choices(config.to_dict()):
        raise RecipeError(
            "a CATConfig with lists is for autotune; quantize and prepare take one value for each option"
        )
    if mode == Mode.PREPARE:
        return _prepare(model, config, kwargs.get("example_inputs"))
    if mode == Mode.CONVERT:
        return _convert(model, config)
    return _quantize(
        model, config, kwargs.get("run_fn"), kwargs.get("run_args"), kwargs.get("example_inputs")
    )


def _finish(corrected: CorrectedModule, config: CATConfig) -> CorrectedModule:
    from cat_plugin.serialization.saving import save

    # Where the host's own save() looks; plain attributes, which nn.Module's type stubs know nothing of.
    corrected.__dict__["qconfig"] = OrderedDict({KEY: config})
    corrected.__dict__["save"] = MethodType(save, corrected)
    return corrected


def _quantize(
    model: nn.Module, config: CATConfig, run_fn: Any, run_args: Any, example_inputs: Any
) -> CorrectedModule:
    if run_fn is None:
        raise HostError(
            "CAT fits its correction to calibration data: pass run_fn, a function that runs the model it is given over "
            "a few hundred inputs, to quantize or autotune"
        )
    if config.base is not None:
        _check_exported(config.base, model)
    session = config._session if config._session is not None else TuningSession()
    record = session.record(
        model, (run_fn, run_args), lambda: CalibrationRecord(*record_run(model, run_fn, run_args))
    )

    def quantize_base() -> nn.Module:
        quantized: nn.Module = _host_function("quantize")(
            model,
            _usable(config.base),
            run_fn=run_fn,
            run_args=run_args,
            inplace=True,
            example_inputs=example_inputs,
        )
        return quantized

    made = quantize_and_correct(
        config.to_dict(), model, record, None if config.base is None else quantize_base, session
    )
    return _finish(made, config)


def _prepare(model: nn.Module, config: CATConfig, example_inputs: Any) -> nn.Module:
    reference = None
    if config.base is not None:
        _check_exported(config.base, model)
        reference = _copy(model)
        model = _host_function("prepare")(
            model, _usable(config.base), inplace=True, example_inputs=example_inputs
        )
    state = _State(reference, InputRecorder())
    state.recorder.attach(model)
    setattr(model, _STATE, state)
    if isinstance(model, torch.fx.GraphModule):
        # A copied graph module keeps its meta, and neither attributes nor hooks.
        model.meta[_STATE] = state
    return model


def _convert(model: nn.Module, config: CATConfig) -> CorrectedModule:
    state: _State | None = getattr(model, _STATE, None) or getattr(model, "meta", {}).get(_STATE)
    if state is None:
        raise HostError(
            "this model was not prepared with CAT: call prepare(model, CATConfig(...)), run the calibration data "
            "through the model it returns, then convert(prepared)"
        )
    state.recorder.detach(model)
    if hasattr(model, _STATE):
        delattr(model, _STATE)
    calls = gathered(state.recorder.calls)
    if not calls:
        raise HostError(
            "the prepared model was not run between prepare and convert; run the calibration data through it, so that "
            "CAT has something to fit its correction to"
        )
    reference = state.reference if state.reference is not None else model
    record = CalibrationRecord(calls, collect_logits(reference, calls, "full-precision"))

    def convert_base() -> nn.Module:
        # The host reads the configuration off the prepared model, where CAT's stands by now.
        setattr(model, "quant_config", _usable(config.base))  # noqa: B010
        setattr(model, "is_prepared", True)  # noqa: B010
        converted: nn.Module = _host_function("convert")(model, inplace=True)
        return converted

    made = quantize_and_correct(
        config.to_dict(), reference, record, None if config.base is None else convert_base
    )
    return _finish(made, config)


class _Monitor(TuningMonitor):  # type: ignore[misc]
    """The host's record of trials, with CAT's criterion, time limit and table."""

    def __init__(self, tuning_config: Any, run: TuningRun, total: int, session: TuningSession) -> None:
        super().__init__(tuning_config)
        self._run = run
        self._total = total
        self._session = session
        session.label = f"trial 1/{total}"

    def set_baseline(self, baseline: float) -> None:
        super().set_baseline(baseline)
        self._run.started(baseline)

    def add_trial_result(self, trial_index: int, trial_result: float, quant_config: BaseConfig) -> None:
        super().add_trial_result(trial_index, trial_result, quant_config)
        self._run.add(quant_config.to_dict(), trial_result)
        self._session.label = f"trial {self.trial_cnt + 1}/{self._total}"

    def _print_trial_results_table(self, trial_index: int, trial_result: float) -> None:
        """Nothing: one table of all trials follows at the end."""

    def need_stop(self) -> bool:
        stop = self.trial_cnt >= self._total or self._run.done()
        if stop:
            self._session.label = "the best trial again"
            for line in self._run.table().splitlines():
                _host_logger().info(line)
        return stop

    def get_best_trial_record(self) -> Any:
        return self.tuning_history[self._run.best()]


def _host_logger() -> Any:
    from neural_compressor.common.utils import logger

    return logger


def _init_tuning(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_tuning(tuning_config: Any) -> Any:
        given = (
            tuning_config.config_set
            if isinstance(tuning_config.config_set, list)
            else [tuning_config.config_set]
        )
        if not any(isinstance(config, CATConfig) for config in given):
            return original(tuning_config)
        # The host lowers this number in the caller's object, from 3.7 on.
        asked = tuning_config.max_trials
        loader, logger, _ = original(tuning_config)
        tuning_config.max_trials = asked
        session = TuningSession()
        distinct: list[BaseConfig] = []
        for config in loader.config_set.config_list:
            if isinstance(config, CATConfig):
                config._session = session
            if not any(config == other for other in distinct):
                distinct.append(config)
        run = getattr(tuning_config, "cat_run", None) or TuningRun(
            Criterion(tolerance=tuning_config.tolerable_loss, max_trials=asked)
        )
        return (
            loader,
            logger,
            _Monitor(tuning_config, run, min(run.criterion.max_trials, len(distinct)), session),
        )

    return init_tuning


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


def attach(host_module: ModuleType = _host) -> None:
    """Register with the host and extend it; a second call does nothing."""
    if algos_mapping.get(NAME) is cat_entry:
        return
    _base_config.register_config(framework_name=FRAMEWORK, algo_name=NAME)(CATConfig)
    importlib.import_module("neural_compressor.torch.utils").register_algo(NAME)(cat_entry)
    autotune_file = importlib.import_module("neural_compressor.torch.quantization.autotune")
    _patches.replace(BaseConfig, "__add__", _add, ("self", "other"))
    _patches.replace(ComposableConfig, "__add__", _add, ("self", "other"))
    _patches.replace(ComposableConfig, "from_dict", _from_dict, ("cls", "config_dict", "config_registry"))
    _patches.replace(
        _base_config.ConfigRegistry, "get_all_config_cls_by_fwk_name", _without_cat, ("cls", "fwk_name")
    )
    _patches.replace(autotune_file, "init_tuning", _init_tuning, ("tuning_config",))
    loading = importlib.import_module("neural_compressor.torch.quantization.save_load_entry")
    for place in (loading, _host):
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


if is_registered():
    attach()
