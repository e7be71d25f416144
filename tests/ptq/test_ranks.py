"""Processes that hold disjoint shares of the calibration inputs give the bits of one process that holds all."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from cat_plugin.errors import CATError, QuantizationError
from cat_plugin.ptq import QuantSpec, quantize
from cat_plugin.ptq.closed_form import layer_fit
from cat_plugin.ptq.quantizers import observers
from cat_plugin.ptq.ranks import ALONE, Extent, share_of
from tests.ptq.models import Attention, GroupedNet, SmallResNet, randomise, small_inputs
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

_ROWS, _BATCH = 80, 16  # five batches: no two, and no three, processes have equally many


class Tokens(nn.Module):
    """Tokens of which the first is read, so that positions count differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.b(torch.relu(self.a(x)))
        return self.head(tokens[:, 0] + 0.2 * tokens.mean(1))


CASES = {
    "plain": (SmallResNet, (3, 12, 12), {"w_bits": 2, "a_bits": 2}),
    "budget": (SmallResNet, (3, 12, 12), {"w_bits": 4, "weight_budget": 4.0, "weight_candidates": [2, 4, 8]}),
    "depthwise": (GroupedNet, (4, 8, 8), {"w_bits": 4, "a_bits": 4}),
    "attention": (Attention, (3, 16, 16), {"attention_bits": 8, "smoothing": "smoothquant"}),
    "rotated": (
        ZOO["vit"].build,
        (3, 16, 16),
        {"w_bits": 4, "a_bits": 4, "attention_bits": 4, "smoothing": "searched", "rotation": "online"},
    ),
    "tokens": (Tokens, (7, 6), {"w_bits": 4, "a_granularity": "token"}),
    "positions": (Tokens, (7, 6), {"w_bits": 3, "a_bits": 4}),
}


def made(name: str):
    make, shape, options = CASES[name]
    spec = QuantSpec(**{"preset": "fast", "batch_size": _BATCH, "a_bits": 8, "w_bits": 8, **options})
    return randomise(make()), spec, small_inputs(_ROWS, *shape)


def few_values() -> None:
    """So little is looked at that even the small nets are sampled."""
    layer_fit.ROWS, observers._SAMPLE, observers._TOKENS = 2000, 3000, 100


def chosen(module, report):
    return {"state": dict(module.state_dict()), "layers": report.to_dict()["layers"], "notes": report.notes}


def failing(model, spec, share, rank):
    if rank == 1:
        share = share.clone()
        share[3, 0, 0] = torch.nan
    quantize(model, spec, share.split(_BATCH))


class Late(nn.Module):
    """Fails on one process, in the middle of the fit and not before."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        if self.rank == 1 and self.calls == 3:
            raise CATError("the third layer is out of luck.")
        return _fit_layer(*arguments, **keywords)


_fit_layer = layer_fit.fit_layer


def late_failure(model, spec, share, rank):
    from cat_plugin.ptq.closed_form import sequence

    sequence.fit_layer = Late(rank)
    try:
        quantize(model, spec, share.split(_BATCH))
    finally:
        sequence.fit_layer = _fit_layer


def nothing_for_one(model, spec, share, rank):
    quantize(model, spec, [] if rank == 1 else share.split(_BATCH))


def other_model(model, spec, share, rank):
    quantize(randomise(SmallResNet(), seed=rank), spec, share.split(_BATCH))


def trained(model, spec, share, rank):
    quantize(model, QuantSpec(preset="balanced"), share.split(_BATCH))


ERRORS = {f.__name__: f for f in (failing, late_failure, nothing_for_one, other_model, trained)}


def worker(rank: int, size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    few_values()
    for name in CASES:
        model, spec, x = made(name)
        share = x[share_of(len(x), _BATCH, rank, size)]
        said: list[object] = []
        kept = f"{directory}/kept" if name == "plain" else None
        result = quantize(model, spec, share.split(_BATCH), progress=said.append, resume=kept)
        torch.save({**chosen(*result), "said": len(said)}, f"{directory}/{name}{rank}.pt")
    # Taken from the checkpoint, which only the first process has.
    model, spec, x = made("plain")
    share = x[share_of(len(x), _BATCH, rank, size)]
    again = quantize(model, spec, share.split(_BATCH), resume=f"{directory}/kept")
    torch.save(chosen(*again), f"{directory}/again{rank}.pt")
    for name, attempt in ERRORS.items():
        try:
            attempt(model, spec, share, rank)
        except CATError as error:
            Path(f"{directory}/{name}{rank}.txt").write_text(str(error), encoding="utf-8")
    if rank == 0:  # one process quantizes on its own where it is told to
        _, report = quantize(model, spec, share.split(_BATCH), distributed=False)
        Path(f"{directory}/alone.txt").write_text(str(report.num_samples), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def results(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(worker, args=(request.param, str(directory)), nprocs=request.param, join=True)
    return directory, request.param


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(results, name, monkeypatch):
    directory, size = results
    monkeypatch.setattr(layer_fit, "ROWS", 2000)
    monkeypatch.setattr(observers, "_SAMPLE", 3000)
    monkeypatch.setattr(observers, "_TOKENS", 100)
    model, spec, x = made(name)
    alone = chosen(*quantize(model, spec, x.split(_BATCH)))
    found = [torch.load(directory / f"{name}{rank}.pt", weights_only=True) for rank in range(size)]
    for rank, one in enumerate(found):
        assert one["state"].keys() == alone["state"].keys()
        assert one["layers"] == found[0]["layers"]
        assert one["notes"] == alone["notes"]
        assert (one["said"] > 0) == (rank == 0)
        for key, value in alone["state"].items():
            assert torch.equal(one["state"][key], found[0]["state"][key]), key
            if value.is_floating_point():
                torch.testing.assert_close(one["state"][key], value, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(one["state"][key], value), key
    for one, other in zip(found[0]["layers"], alone["layers"], strict=True):
        assert one["loss_after"] == pytest.approx(other["loss_after"], rel=1e-4)


def test_every_process_takes_what_the_first_has_kept(results):
    directory, size = results
    for rank in range(size):
        again, first = (
            torch.load(directory / f"{name}{rank}.pt", weights_only=True) for name in ("again", "plain")
        )
        assert again["layers"] == first["layers"]
        assert all(torch.equal(again["state"][key], value) for key, value in first["state"].items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("failing", "NaN or infinite"),
        ("late_failure", "out of luck"),
        ("nothing_for_one", "yielded no batch"),
        ("other_model", "was given another model than process 0"),
        ("trained", "preset 'fast'"),
    ],
)
def test_an_error_on_one_process_ends_all_with_its_message(results, name, words):
    directory, size = results
    for rank in range(size):
        message = (directory / f"{name}{rank}.txt").read_text(encoding="utf-8")
        assert words in message
        if name in ("failing", "late_failure", "nothing_for_one"):
            assert ("process 1 of" in message) == (rank != 1)


def test_one_process_quantizes_alone_where_it_is_told_to(results):
    directory, size = results
    rows = share_of(_ROWS, _BATCH, 0, size)
    assert int((directory / "alone.txt").read_text()) == rows.stop - rows.start


def test_shares_are_whole_batches_and_cover_everything():
    for count, batch, size in ((100, 20, 2), (97, 16, 3), (64, 64, 1), (5, 1, 5)):
        shares = [share_of(count, batch, rank, size) for rank in range(size)]
        assert [s.start for s in shares] == [0, *(s.stop for s in shares[:-1])]
        assert shares[-1].stop == count
        assert all(s.start % batch == 0 for s in shares)
        lengths = [-(-(s.stop - s.start) // batch) for s in shares]
        assert max(lengths) - min(lengths) <= 1


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(QuantizationError, match="Set batch_size to 21 or less"):
        share_of(64, 64, 0, 3)


def test_batches_of_the_others():
    assert Extent((48, 32, 10), 1).others(32) == ([32, 16], [10])
    assert (Extent((48, 32, 10), 1).start, Extent((48, 32, 10), 1).total) == (48, 90)


def test_one_process_changes_nothing():
    x = torch.arange(6.0)
    ALONE.sum_([x])
    assert ALONE.gather(x) is x
    assert ALONE.same(x) is x
    assert torch.equal(ALONE.picked(x, torch.tensor([4, 1])), torch.tensor([4.0, 1.0]))
