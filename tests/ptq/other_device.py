"""A device that is not there: tensors that say they live on a GPU and compute on the processor.

What mixes devices fails as it would on hardware, where the processor's own tests cannot see it: each operation is looked at
before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

backend_registration._setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere", 0)
_HERE = torch.device("cpu")


class Elsewhere(Tensor):
    """A tensor on the device; its numbers are in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, Elsewhere) for tensor in tensors]
    name = func._schema.name
    moves = name in ("aten::_to_copy", "aten::copy_")
    # A number without axes may stand beside tensors of any device; indices on the processor may be used on a GPU.
    fixed = [
        t for t in tensors if t.dim() and not (name.startswith("aten::index") and not t.is_floating_point())
    ]
    kinds = {isinstance(tensor, Elsewhere) for tensor in fixed}
    if len(kinds) > 1 and not moves:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {[t.device for t in tensors]}")
    generator = kwargs.get("generator")
    asked = kwargs.get("device")
    to_there = (
        torch.device(asked).type == DEVICE.type
        if asked is not None
        else (any(kinds) or (not fixed and any(there)))
    )
    if generator is not None and generator.device.type != (DEVICE if to_there else _HERE).type:
        raise RuntimeError(f"{name}: a generator on {generator.device} for the device {asked or DEVICE}")
    if asked is not None:
        kwargs = {**kwargs, "device": _HERE}
    plain_args, plain_kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable:
        return args[0] if func._schema.returns else None
    if not to_there:
        return result
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, result)


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype, device=_HERE))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    for tensor in (source, target):
        assert isinstance(tensor, Elsewhere) or tensor.device == _HERE
    held = target.held if isinstance(target, Elsewhere) else target
    held.copy_(source.held if isinstance(source, Elsewhere) else source)
    return target


# ``torch.tensor(..., device=...)`` asks the device itself.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where one is asked for, and looks at what has none of its tensors."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, within the block."""
    with _Factories():
        yield DEVICE
