"""``CATConfig``: the configuration class that Neural Compressor 3.x finds under the name ``cat``."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from neural_compressor.common.base_config import BaseConfig, ComposableConfig, config_registry
from torch import nn

from cat_plugin.errors import RecipeError
from cat_plugin.options import with_parameters
from cat_plugin.recipe import options
from cat_plugin.recipe.schema import cat_options

__all__ = ["FRAMEWORK", "KEY", "NAME", "CATConfig", "as_base"]

FRAMEWORK = "torch"
NAME = "cat"
#: The one pseudo-operator that stands for the whole model in the host's mapping of operators to configurations.
KEY = ("cat", "CAT")


def _known_bases() -> dict[str, type[BaseConfig]]:
    known = dict(config_registry.get_cls_configs().get(FRAMEWORK, {}))
    known.pop(NAME, None)
    return known


def as_base(value: Any) -> Any:
    """A configuration of the host from any spelling of one."""
    if value is None:
        return None
    if isinstance(value, list):
        return [as_base(item) for item in value]
    if isinstance(value, (CATConfig, ComposableConfig)) or not isinstance(value, (BaseConfig, Mapping, str)):
        raise RecipeError(
            f"cat.base is a {type(value).__name__}; expected one configuration of the host, such as "
            "RTNConfig(bits=4), or a mapping of one key such as {'rtn': {'bits': 4}}"
        )
    if isinstance(value, BaseConfig):
        return value
    given = {value: {}} if isinstance(value, str) else dict(value)
    if len(given) != 1:
        raise RecipeError(
            f"cat.base has the keys {', '.join(map(str, given))}; expected the name of one algorithm"
        )
    name, params = next(iter(given.items()))
    known = _known_bases()
    if name not in known:
        raise RecipeError(f"unknown algorithm {name!r} in cat.base; {options.nearest(name, known)}")
    params = dict(params or {})
    if not {"global", "local"} & set(params):
        # The host swallows a misspelt parameter without a word.
        options.check_keys(
            params, list(inspect.signature(known[name].__init__).parameters)[1:], f"cat.base.{name}"
        )
    return known[name].from_dict(params)


def _base_to_dict(base: Any) -> Any:
    if base is None:
        return None
    if isinstance(base, list):
        return [_base_to_dict(item) for item in base]
    # A copy, and without what the host adds while it works (fallback entries for lm_head, its own lists).
    params = {key: value for key, value in base.get_params_dict().items() if not key.startswith("_")}
    params.pop("params_list", None)
    params.pop("non_tunable_params", None)
    return {base.name: params}


class CATConfig(BaseConfig):  # type: ignore[misc]
    """Configuration of the ``cat`` algorithm: low-bit quantization followed by cluster-affine correction.

    ::

        cat:
          w_bits: [4, 2]        # a list is a choice for autotune
          a_bits: 4
          preset: balanced      # or fast, best
          num_clusters: 64
          alpha: 0.4
          pca_dim: null         # principal components used for clustering
          mode: auto
          seed: 0
          holdout: 0.25         # share of the calibration rows that the engine does not see
          base: {rtn: {bits: 4}}   # instead of w_bits, a_bits, preset: correct an algorithm of the host

    Its parameters are the options of the correction, ``base``, and those of :class:`cat_plugin.ptq.QuantSpec`.  Each takes
    one value, or a list of values to try.

    Raises
    ------
    RecipeError
        On an unknown parameter (naming the nearest known one), a value out of range, or an option of the engine beside a
        base.
    """

    name = NAME
    supported_configs: list[Any] = []  # noqa: RUF012  (the host assigns it)

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__()
        given = options.by_name(args, given, "CATConfig")
        if "base" in given:
            given["base"] = as_base(given["base"])
        options.check({**given, "base": _base_to_dict(given.get("base"))}, "CATConfig")
        defaults = {name: each.plain_default for name, each in cat_options().items()}
        self.__dict__.update({**defaults, **given, "_given": set(given), "_session": None})

    __init__.__signature__ = options.signature()  # type: ignore[attr-defined]

    def __setattr__(self, key: str, value: Any) -> None:
        if key in cat_options():
            value = as_base(value) if key == "base" else value
            changed = {**self._chosen(), "base": self.base, key: value}
            options.check({**changed, "base": _base_to_dict(changed["base"])}, "CATConfig")
            self._given.add(key)
        self.__dict__[key] = value

    def _chosen(self) -> dict[str, Any]:
        """Every option but the base that differs from its default."""
        return {
            name: self.__dict__[name]
            for name, each in cat_options().items()
            if name != "base" and self.__dict__[name] != each.plain_default
        }

    def _params(self) -> dict[str, Any]:
        """Every option but the base."""
        return {name: self.__dict__[name] for name in cat_options() if name != "base"}

    def uses(self, algorithm: str) -> bool:
        """Whether the base, or one of several, is that algorithm of the host."""
        bases = self.base if isinstance(self.base, list) else [self.base]
        return any(base is not None and base.name == algorithm for base in bases)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; ``CATConfig.from_dict`` reads it."""
        return options.with_defaults({**self._params(), "base": _base_to_dict(self.base)})

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters and their values."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any] | None) -> "CATConfig":
        """Make a configuration from a mapping of parameters."""
        given = dict(config_dict or {})
        if set(given) <= {"global", "local"} and given:
            config = cls(**(given.get("global") or {}))
            for name, params in (given.get("local") or {}).items():
                config.set_local(name, cls(**params))
            return config
        options.check_keys(given, cat_options(), "cat")
        return cls(**given)

    def set_local(self, operator_name_or_list: Any, config: BaseConfig) -> "CATConfig":
        """Give layers of a name (a shell-style pattern) other bit-widths than the rest.

        Parameters
        ----------
        operator_name_or_list : str or list of str
            Layer names.
        config : CATConfig
            Its ``w_bits`` and ``a_bits`` are used; any other parameter must be at its default.
        """
        names = operator_name_or_list if isinstance(operator_name_or_list, list) else [operator_name_or_list]
        if not isinstance(config, CATConfig) or not all(isinstance(name, str) for name in names):
            raise RecipeError("CATConfig.set_local takes layer names and a CATConfig with w_bits and a_bits")
        plain = CATConfig(w_bits=config.w_bits, a_bits=config.a_bits)
        if config != plain:
            raise RecipeError("CATConfig.set_local: only w_bits and a_bits can differ from layer to layer")
        bits = {"w_bits": config.w_bits, "a_bits": config.a_bits}
        self.overrides = {**self.__dict__["overrides"], **dict.fromkeys(names, bits)}
        return self

    def expand(self) -> list[BaseConfig]:
        """Every combination of the list-valued options and of the base's own lists, the cheap ones first."""
        bases = self.base if isinstance(self.base, list) else [self.base]
        bases = [
            each for base in bases for each in ([None] if base is None else copy.deepcopy(base).expand())
        ]
        pairs = [(params, base) for base in bases for params in options.expand(self._chosen())]
        chosen = options.order([{**params, "base": _base_to_dict(base)} for params, base in pairs])
        return [type(self)(**pairs[number][0], base=pairs[number][1]) for number in chosen]

    def __add__(self, other: BaseConfig) -> BaseConfig:
        """``CATConfig() + RTNConfig()``: the same as ``CATConfig(base=RTNConfig())``."""
        if isinstance(other, CATConfig):
            raise RecipeError(
                "two CATConfigs cannot be added; give a list of them to TuningConfig(config_set=...)"
            )
        if self.base is not None:
            raise RecipeError(
                "this CATConfig has a base already; one algorithm of the host can be corrected at a time"
            )
        return type(self)(**{name: self.__dict__[name] for name in self._given - {"base"}}, base=other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CATConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def get_model_info(self, model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, str]]:
        """The one pseudo-operator that stands for the whole model."""
        return [KEY]

    def to_config_mapping(
        self, config_list: list[BaseConfig] | None = None, model_info: list[tuple[str, str]] | None = None
    ) -> OrderedDict[tuple[str, str], BaseConfig]:
        """Map the pseudo-operator to this configuration; the base is run by the entry function itself."""
        return OrderedDict({KEY: self})

    @classmethod
    def register_supported_configs(cls) -> None:
        """Nothing to add: the engine decides by layer."""

    @classmethod
    def get_config_set_for_tuning(cls) -> "CATConfig":
        """A small set to start tuning from."""
        return cls(w_bits=[4, 3, 2], a_bits=[4, 8], preset="fast")


CATConfig.__doc__ = with_parameters(inspect.cleandoc(CATConfig.__doc__ or ""), cat_options())
