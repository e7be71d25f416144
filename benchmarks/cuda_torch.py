"""What PyTorch takes for the same networks, for :mod:`benchmarks.cuda`.

Full-precision networks in float32 (eager), in float16 (half), and in float16 compiled with CUDA graphs (compile).  Weights are random:
they are of no consequence for the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.cuda_models import median

__all__ = ["compile_ahead", "fill_cache", "time_compiled", "time_eager", "wait"]

Keep = Callable[[dict[str, Any]], None]
_COMPILED_BATCHES = (1, 16)
_SHAPES = {
    "resnet20": (3, 32, 32),
    "resnet18": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
    "vit_s": (3, 224, 224),
}
_TOKENS = 128
_FOR_ONE = 12.0  # seconds that a network takes at least to come from the cache


def _network(name: str) -> Any:
    """A network of the benchmarks, without its weights."""
    import torch
    from torch import nn

    from benchmarks.networks import CifarResNet, MobileNetV2, ResNet18

    class Encoder(nn.Module):
        def __init__(self, first: nn.Module, heads: int, depth: int, before: bool, classes: int) -> None:
            super().__init__()
            self.first = first
            sizes = {"d_model": 384, "nhead": heads, "dim_feedforward": 1536, "activation": "gelu"}
            layer = nn.TransformerEncoderLayer(**sizes, batch_first=True, norm_first=before)
            self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
            self.head = nn.Linear(384, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.blocks(self.first(x)).mean(1))
            return logits

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 384, 14, 14)
            self.token, self.position = (nn.Parameter(torch.zeros(1, n, 384)) for n in (1, 257))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            return torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.position = nn.Embedding(30522, 384), nn.Parameter(torch.zeros(_TOKENS, 384))
            self.norm = nn.LayerNorm(384)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            embedded: torch.Tensor = self.norm(self.words(x) + self.position)
            return embedded

    made: dict[str, Callable[[], nn.Module]] = {
        "resnet20": CifarResNet,
        "resnet18": ResNet18,
        "mobilenet_v2": MobileNetV2,
        "vit_s": lambda: Encoder(Patches(), 6, 12, True, 10),
        "minilm": lambda: Encoder(Words(), 12, 6, False, 12),
    }
    return made[name]().eval().cuda()


def _known(name: str) -> str | None:
    """The network of a model such as ``resnet18_w8a8``."""
    network = name.split(",")[0].rsplit("_", 1)[0]
    return network if network in _SHAPES or network == "minilm" else None


def _channels_last(torch: Any, x: Any) -> Any:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def _call(model: Any, x: Any) -> Callable[[int], Any]:
    return lambda _: model(x)


def _compiled(torch: Any, name: str, x: Any) -> Callable[[int], Any]:
    model = _network(name).half().to(memory_format=torch.channels_last)
    x = _channels_last(torch, x.half() if x.is_floating_point() else x)
    return _call(torch.compile(model, mode="reduce-overhead", dynamic=False), x)


def fill_cache(name: str, batches: Sequence[int]) -> None:
    """Compile a network, so that it lies in the cache of PyTorch's compiler."""
    import torch

    for batch in batches:
        if name == "minilm":
            x = torch.zeros((batch, _TOKENS), dtype=torch.int64, device="cuda")
        else:
            x = torch.zeros((batch, *_SHAPES[name]), device="cuda")
        with torch.inference_mode():
            function = _compiled(torch, name, x)
            for i in range(3):
                function(i)
        torch.cuda.synchronize()


def compile_ahead(entries: Sequence[dict[str, Any]]) -> list[subprocess.Popen[bytes]]:
    """Start processes that compile the networks of all models."""
    names = {_known(entry["name"]) for entry in entries if entry["kind"] == "model"} - {None}
    environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="4")
    command = [sys.executable, "-m", "benchmarks.cuda", "compile-ahead"]
    return [
        subprocess.Popen([*command, str(name), str(batch)], env=environment)
        for name in sorted(map(str, names))
        for batch in _COMPILED_BATCHES
    ]


def wait(processes: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    """Let the processes finish, or end them when their time is over."""
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def time_eager(torch: Any, row: dict[str, Any], data: np.ndarray[Any, Any], repeats: int, keep: Keep) -> None:
    """Float32 and float16, kernel by kernel."""
    name = _known(row["name"])
    if name is None:
        return
    model = _network(name).to(memory_format=torch.channels_last)
    x = _channels_last(torch, torch.from_numpy(data).cuda())
    with torch.inference_mode():
        for label in ("eager", "half"):
            taken = median(_call(model, x), torch.cuda.synchronize, max(1, repeats // 4))
            row[f"torch_{label}_microseconds"] = taken
            model, x = model.half(), x.half() if x.is_floating_point() else x
    keep(row)


def time_compiled(
    torch: Any,
    models: Sequence[tuple[dict[str, Any], np.ndarray[Any, Any]]],
    repeats: int,
    deadline: float,
    keep: Keep,
) -> None:
    """Float16 compiled with CUDA graphs, as long as there is time."""
    known: dict[tuple[str, int], float] = {}
    for batch in (1, 16, 128):
        for row, data in models:
            name = _known(row["name"])
            if name is None or len(data) != batch:
                continue
            if (name, batch) not in known:
                if time.monotonic() > deadline - _FOR_ONE:
                    return
                with torch.inference_mode():
                    function = _compiled(torch, name, torch.from_numpy(data).cuda())
                    known[name, batch] = median(function, torch.cuda.synchronize, repeats)
                torch.compiler.reset()
            row["torch_compile_microseconds"] = known[name, batch]
            keep(row)
            print(f"{row['name']:<44} {'compile':<22} {known[name, batch]:>9.1f}", flush=True)
