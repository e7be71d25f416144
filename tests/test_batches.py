"""The reader of batches: every form that data loaders yield, and what it refuses."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch

from cat_plugin.batches import ModelCall, as_calls, gathered, read_batch, stacked
from cat_plugin.errors import CATTypeError

X, Y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 4, dtype=torch.int64)


def equal(one: ModelCall, other: ModelCall) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return str(one) == str(other) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("batch", "call"),
    [
        (X, ModelCall((X,))),
        (X.numpy(), ModelCall((X,))),
        ((X, Y), ModelCall((X,))),
        ([X, 3], ModelCall((X,))),
        ((X,), ModelCall((X,))),
        ({"x": X, "mask": Y}, ModelCall((), {"x": X, "mask": Y})),
        ({"x": X.numpy()}, ModelCall((), {"x": X})),
        (((X, Y), 3), ModelCall((X, Y))),
        (([X.numpy(), Y], 3), ModelCall((X, Y))),
        (({"x": X}, 3), ModelCall((), {"x": X})),
        (ModelCall((X, Y), {"z": X}), ModelCall((X, Y), {"z": X})),
        (namedtuple("Sample", "image label")(X, 3), ModelCall((X,))),
    ],
)
def test_forms_of_batches(batch, call):
    assert equal(read_batch(batch, "batch"), call)


@pytest.mark.parametrize(
    "batch", ["x", 3, None, (), [], ["x", X], {}, {"x": 3}, {1: X}, ((3, 4), X), np.array(["x"])]
)
def test_batches_that_cannot_be_read(batch):
    with pytest.raises(CATTypeError, match=r"calibration batch 1 is a \w+; expected a tensor"):
        list(as_calls([X, batch]))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0)[::-1].reshape(2, 3),
        np.broadcast_to(np.arange(3.0), (2, 3)),
        np.arange(6.0).astype(">f8").reshape(2, 3),
    ],
    ids=["negative strides", "read only", "foreign byte order"],
)
def test_arrays_that_torch_does_not_take_are_copied(array, recwarn):
    (given,) = read_batch(array, "batch").args
    assert given.tolist() == array.tolist()
    assert not recwarn.list


def test_arrays_are_not_copied_without_need():
    array = np.ones((2, 3), np.float32)
    assert read_batch(array, "batch").args[0].data_ptr() == array.ctypes.data


def test_one_tensor_is_read_in_portions():
    whole = torch.arange(260.0).reshape(130, 2)
    calls = list(as_calls(whole))
    assert [call.rows for call in calls] == [64, 64, 2]
    assert torch.equal(torch.cat([call.args[0] for call in calls]), whole)
    assert calls[0].args[0].data_ptr() == whole.data_ptr()


def test_one_mapping_is_one_batch():
    assert [equal(call, ModelCall((), {"x": X})) for call in as_calls({"x": X})] == [True]


@pytest.mark.parametrize("calibration", [5, None, torch.tensor(1.0)])
def test_what_cannot_be_iterated(calibration):
    with pytest.raises(CATTypeError, match="calibration"):
        list(as_calls(calibration))


def test_the_first_rows_of_a_call():
    scale = torch.ones(7)
    call = ModelCall((X, [Y, scale]), {"flag": True, "z": {"deep": X}}).first(1)
    assert call.rows == 1
    assert torch.equal(call.args[0], X[:1])
    assert call.args[1][0].shape == (1, 4)
    assert call.args[1][1] is scale
    assert call.kwargs["flag"] is True
    assert call.kwargs["z"]["deep"].shape == (1, 3)


def test_a_copy_shares_no_memory():
    buffer = X.clone()
    call = ModelCall((buffer, (buffer,)), {"x": buffer}).copied()
    buffer.zero_()
    assert all(torch.equal(tensor, X) for tensor in call.tensors)


def test_portions_of_one_tensor_are_stacked_without_a_copy():
    whole = torch.arange(24.0).reshape(6, 4)
    portions = list(whole.split(2))
    joined = stacked(portions[1:])
    assert torch.equal(joined, whole[2:])
    assert joined.data_ptr() == portions[1].data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[::-1],
        lambda parts: [parts[0], parts[2]],
        lambda parts: [part.clone() for part in parts],
        lambda parts: [part[:1] for part in parts],
        lambda parts: [part[:, 1:] for part in parts],
        lambda parts: [parts[0], parts[1].view(torch.int32).view(torch.float32).clone()],
    ],
)
def test_others_are_copied(change):
    batches = change(list(torch.arange(24.0).reshape(6, 4).split(2)))
    joined = stacked(batches)
    assert torch.equal(joined, torch.cat(batches))
    assert all(joined.data_ptr() != batch.data_ptr() for batch in batches)


def test_calls_are_gathered_in_one_storage():
    calls = [ModelCall((torch.full((rows, 3), float(rows)),)) for rows in (2, 2, 1)]
    before = [call.args[0].clone() for call in calls]
    found = gathered(calls)
    assert calls == []
    assert all(torch.equal(call.args[0], value) for call, value in zip(found, before, strict=True))
    assert stacked([call.args[0] for call in found]).data_ptr() == found[0].args[0].data_ptr()


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [ModelCall((X, Y))],
        [ModelCall((), {"x": X})],
        [ModelCall((X,)), ModelCall((Y,))],
        [ModelCall((torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),))],
        [ModelCall((torch.tensor(1.0),))],
    ],
)
def test_calls_that_are_not_alike_stay_as_they_are(calls):
    assert gathered(calls) is calls


def test_a_call_says_what_it_gives():
    call = ModelCall((X, (Y, 3)), {"mask": None, "z": {"deep": X}})
    assert str(call) == "float32 (2, 3), (int64 (2, 4), 3), mask=None, z={deep: float32 (2, 3)}"
    assert str(ModelCall(())) == "no argument"
