"""The ``cat`` algorithm: what the host calls to quantize, to prepare and to convert a model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from neural_compressor.common.base_config import BaseConfig
from neural_compressor.common.utils import Mode
from torch import nn

from cat_plugin.batches import ModelCall, gathered
from cat_plugin.correction import CorrectedModule
from cat_plugin.errors import HostError, RecipeError
from cat_plugin.hosts.inc3.config import KEY, CATConfig
from cat_plugin.hosts.pipeline import TuningSession, quantize_and_correct
from cat_plugin.hosts.recording import InputRecorder, calibrated, record_run
from cat_plugin.ptq.spec import QuantSpec
from cat_plugin.recipe import options

__all__ = ["cat_entry"]

_log = logging.getLogger("cat_plugin")
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


@contextlib.contextmanager
def _named_packages(base: BaseConfig) -> Iterator[None]:
    """What the host's algorithm imports without declaring it, such as tqdm in GPTQ, is named."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise HostError(
            f"Neural Compressor's {base.name} needs the package {error.name}, which is not installed: pip install {error.name}"
        ) from error


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
        _transforms(config)
        _check_exported(config.base, model)
    session = config._session if config._session is not None else TuningSession()
    record = session.record(
        model, (run_fn, run_args), config.to_dict(), lambda: record_run(model, run_fn, run_args)
    )

    def quantize_base() -> nn.Module:
        given = _transformed(model, config, record.calls)
        with _named_packages(config.base):
            quantized: nn.Module = _host_function("quantize")(
                given,
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


def _transformed(model: nn.Module, config: CATConfig, calls: list[ModelCall]) -> nn.Module:
    """The model that the host's algorithm is given: with channels scaled and rotated where that is asked for."""
    spec = _transforms(config)
    if spec is None:
        return model
    from cat_plugin.ptq import transform

    return transform(model, spec, calls)


def _transforms(config: CATConfig) -> QuantSpec | None:
    base = config.base
    bits, group = (getattr(base, name, None) for name in ("bits", "group_size"))
    width = int(bits) if isinstance(bits, int) and 2 <= bits <= 8 else 4
    groups = int(group) if isinstance(group, int) and group >= 8 else None
    spec = options.transform_spec(config.to_dict(), width, groups)
    if spec is not None and base.name == "static_quant":
        raise HostError(
            "smoothing and rotation go over algorithms of the host that round weights alone (rtn, gptq, awq, teq), and the base "
            "is static_quant; quantize by the engine instead (w_bits: 8, a_bits: 8, smoothing), without a base"
        )
    return spec


def _prepare(model: nn.Module, config: CATConfig, example_inputs: Any) -> nn.Module:
    reference = None
    if config.base is not None and _transforms(config) is not None:
        raise HostError(
            "smoothing and rotation over an algorithm of the host need the calibration data before it prepares the model; "
            "call quantize or autotune, with run_fn, instead of prepare and convert"
        )
    if config.base is not None:
        _check_exported(config.base, model)
        reference = _copy(model)
        with _named_packages(config.base):
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
    record = calibrated(reference, calls, config.to_dict())

    def convert_base() -> nn.Module:
        # The host reads the configuration off the prepared model, where CAT's stands by now.
        setattr(model, "quant_config", _usable(config.base))  # noqa: B010
        setattr(model, "is_prepared", True)  # noqa: B010
        with _named_packages(config.base):
            converted: nn.Module = _host_function("convert")(model, inplace=True)
        return converted

    made = quantize_and_correct(
        config.to_dict(), reference, record, None if config.base is None else convert_base
    )
    return _finish(made, config)
