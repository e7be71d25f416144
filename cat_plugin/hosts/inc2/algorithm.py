"""The ``cat`` algorithm: what stands in the place of functions of one strategy and its adaptor while they run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import HostError
from cat_plugin.hosts.inc2.options import candidates
from cat_plugin.recipe import options

if TYPE_CHECKING:
    from torch import nn

    from cat_plugin.hosts.pipeline import TuningSession
    from cat_plugin.recipe.tuning import TuningRun

__all__ = ["HostState", "configurations", "converted", "quantize", "stop"]

_PARAMS = "cat_params"
_NO_BASE: dict[str, Any] = {"static_quant": {}}


class HostState:
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


def configurations(state: HostState, original: Callable[[], Iterator[Any]]) -> Iterator[Any]:
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


def stop(run: TuningRun, original: Callable[..., Any], *args: Any) -> bool:
    """The host's bookkeeping, and the criterion of the recipe that it runs for."""
    original(*args)
    return run.done()


def converted(state: HostState, original: Callable[[Any], Any], configuration: Any) -> Any:
    """The host's form of a configuration, with CAT's options in it."""
    carrier = original(configuration)
    if state.current is not None:
        carrier["recipe_cfgs"] = {**carrier.get("recipe_cfgs", {}), _PARAMS: state.current}
    return carrier


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


def quantize(state: HostState, *args: Any) -> Any:
    """:func:`_corrected`, remembering that an error came out of it."""
    try:
        return _corrected(state, *args)
    except Exception as error:
        state.error = error
        raise


def _corrected(
    state: HostState,
    adaptor: Any,
    original: Callable[..., Any],
    tune_cfg: dict[str, Any],
    model: Any,
    dataloader: Any,
    q_func: Any = None,
) -> Any:
    """The adaptor's ``quantize``, followed by the correction when the configuration asks for it."""
    from cat_plugin.hosts.inc2.loader import CallLoader, feed
    from cat_plugin.hosts.pipeline import quantize_and_correct
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
    base = {} if state.engine else {"base": _NO_BASE}
    record = state.session.record(
        reference, source, {**params, **base}, lambda: record_run(reference, run_fn)
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
            options.with_defaults({**params, **base}),
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
