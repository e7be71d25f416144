"""Values written into tensors that others read, or read already: functions of (N, 8, 8, 8) activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MUTATION"]


def _slice_relu(y: Tensor) -> Tensor:
    y[:, :4].relu_()
    return y


def _view_add(y: Tensor) -> Tensor:
    y.view(y.shape[0], -1).add_(1)
    return y


def _permuted_relu(y: Tensor) -> Tensor:
    y.permute(0, 2, 3, 1).relu_()
    return y


def _strided_functional(y: Tensor) -> Tensor:
    F.relu(y[:, ::2], True)
    return y


def _alias_before(y: Tensor) -> Tensor:
    old = y
    y += 1
    return old * 0.5 + y


def _view_before(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    y.mul_(2)
    return flat.view_as(y) + y


def _copy_before(y: Tensor) -> Tensor:
    old = y.clone()
    y.relu_()
    return y + old


def _assign_zero(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


def _scale_slice(y: Tensor) -> Tensor:
    y[:, :4] *= 2
    return y


def _fill_zeros_like(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :4] = y[:, 4:]
    return out


def _assign_in_clone(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :, 0] = 0
    return z + y


def _chunk_sigmoid(y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    a.sigmoid_()
    return torch.cat([a * b, y[:, :4]], 1)


def _masked_fill(y: Tensor) -> Tensor:
    y.masked_fill_(y < 0, 0.1)
    return y


def _copy_into(y: Tensor) -> Tensor:
    y[:, 1].copy_(y[:, 2])
    return y


def _in_place_chain(y: Tensor) -> Tensor:
    return y.add_(0.5).mul_(2).clamp_(-1, 3).sub_(0.25)


def _each_channel(y: Tensor) -> Tensor:
    for number, channel in enumerate(y.unbind(1)):
        channel.mul_(number)
    return y


def _fill_new(y: Tensor) -> Tensor:
    out = y.new_empty(y.shape)
    out[:, 0::2], out[:, 1::2] = y[:, 1::2], y[:, 0::2]
    return out + torch.empty_like(y).copy_(y.flip(2))


MUTATION: dict[str, Callable[[Tensor], Tensor]] = {
    "slice-relu_": _slice_relu,
    "view-add_": _view_add,
    "permute-relu_": _permuted_relu,
    "strided-relu-inplace": _strided_functional,
    "alias-before": _alias_before,
    "view-before": _view_before,
    "clone-before": _copy_before,
    "assign-zero": _assign_zero,
    "scale-slice": _scale_slice,
    "fill-zeros_like": _fill_zeros_like,
    "assign-in-clone": _assign_in_clone,
    "chunk-sigmoid_": _chunk_sigmoid,
    "masked_fill_": _masked_fill,
    "assign-where": lambda y: y.clone().index_put_((y < -0.2,), torch.tensor(-0.2)),
    "copy-into": _copy_into,
    "unbind-mul_": _each_channel,
    "fill-new_empty": _fill_new,
    "in-place-chain": _in_place_chain,
}
