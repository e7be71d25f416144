"""Quantization and correction where a GPU computes; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

import cat_plugin
from cat_plugin.cluster_affine import ClusterAffine
from cat_plugin.ptq import QuantSpec, quantize
from tests.ptq.models import Attention, GroupedNet, SmallResNet, randomise, small_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = [
    (SmallResNet, (64, 3, 12, 12), {"w_bits": 4, "a_bits": 4}),
    (SmallResNet, (64, 3, 12, 12), {"w_bits": 2, "a_bits": 2, "preset": "balanced", "unit_steps": 20}),
    (GroupedNet, (64, 4, 8, 8), {"w_bits": 4, "a_bits": 8}),
    (Attention, (64, 3, 16, 16), {"w_bits": 8, "a_bits": 8, "attention_bits": 8}),
]


def _divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b) ** 2).mean() / (b**2).mean())


@pytest.mark.parametrize(("make", "shape", "options"), CASES)
def test_a_gpu_quantizes_as_well_as_the_processor(make, shape, options):
    model, x = randomise(make()), small_inputs(*shape)
    spec = QuantSpec(**{"preset": "fast", "batch_size": 16, "refinement_steps": 0, **options})
    here, _ = quantize(model, spec, x.split(16))
    there, _ = quantize(model, spec, x.split(16), device="cuda")
    assert {p.device.type for p in there.buffers()} == {"cpu"}
    with torch.no_grad():
        expected = model(x)
        ours, theirs = _divergence(here(x), expected), _divergence(there(x), expected)
    # Sums in another order move a rounding now and then: the integers differ, the quality does not.
    assert theirs < 1.25 * ours + 1e-4


def test_a_model_that_lives_on_a_gpu_stays_there():
    model, x = randomise(SmallResNet()).cuda(), small_inputs(64, 3, 12, 12).cuda()
    module, _ = quantize(model, QuantSpec(w_bits=4, a_bits=4, preset="fast"), x.split(16))
    assert {b.device.type for b in module.buffers()} == {"cuda"}
    step = ClusterAffine(mode="diagonal", n_clusters=4, random_state=0)
    corrected = cat_plugin.correct(module, model, x.split(16), step)
    with torch.no_grad():
        before, after, expected = module(x), corrected(x), model(x)
    assert after.device.type == "cuda"
    assert _divergence(after, expected) < _divergence(before, expected)


def _share_on_a_gpu(rank: int, directory: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    model, x = randomise(SmallResNet()), small_inputs(64, 3, 12, 12)
    spec = QuantSpec(w_bits=4, a_bits=4, preset="fast", batch_size=16)
    module, _ = quantize(model, spec, x[32 * rank : 32 * (rank + 1)].split(16), device="cuda")
    torch.save(module.state_dict(), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_end_with_the_same_bits(tmp_path):
    multiprocessing.spawn(_share_on_a_gpu, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(second[key], value) for key, value in first.items())
    model, x = randomise(SmallResNet()), small_inputs(64, 3, 12, 12)
    one, _ = quantize(model, QuantSpec(w_bits=4, a_bits=4, preset="fast", batch_size=16), x, device="cuda")
    same = [
        torch.equal(first[key], value) for key, value in one.state_dict().items() if value.dtype == torch.int8
    ]
    assert same
    assert all(same)
