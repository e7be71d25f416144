"""A small trained network and its data; which hosts are there, and why a test is skipped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cat_plugin

torch.set_num_threads(1)


def inc_version() -> tuple[int, int]:
    """Major and minor version of the installed Neural Compressor, (0, 0) without one."""
    for name in ("neural-compressor", "neural_compressor"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int("".join(c for c in minor if c.isdigit()))
    return 0, 0


INC = inc_version()
needs_inc3 = pytest.mark.skipif(INC < (3, 0), reason=f"needs Neural Compressor 3.x, found {INC[0]}.{INC[1]}")
needs_pt2e = pytest.mark.skipif(
    INC < (3, 9), reason=f"static int8 in Neural Compressor {INC[0]}.{INC[1]} does not work with torch 2.13"
)


class Net(torch.nn.Module):
    """Two convolutions and two linear layers (the hosts' weight-only algorithms see the latter)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.conv2 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc1 = torch.nn.Linear(16 * 16, 32)
        self.fc2 = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.conv2(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


class Task:
    """A trained network, calibration batches, and held-out images and labels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target)
        train = slice(0, 1000)
        self.batches = list(images[1000:1250].split(50))
        self.images, self.labels = images[1250:], labels[1250:]
        torch.manual_seed(0)
        self.net = Net()
        optimizer = torch.optim.Adam(self.net.parameters(), lr=4e-3)
        for _ in range(6):
            for rows in torch.randperm(1000).split(50):
                loss = torch.nn.functional.cross_entropy(self.net(images[train][rows]), labels[train][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.net.eval()

    def run_fn(self, model: Any) -> None:
        """The calibration function that a user of the host writes."""
        for batch in self.batches:
            model(batch)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(self.images)

    def accuracy(self, model: Any) -> float:
        """The evaluation function that a user of the host writes."""
        return float((self.logits(model).argmax(1) == self.labels).float().mean())


@pytest.fixture(scope="session")
def _task() -> Task:
    return Task()


@pytest.fixture
def task(_task: Task) -> Iterator[Task]:
    """The task; a test that changes the network fails the next one's check, so look at it after each."""
    before = {name: value.clone() for name, value in _task.net.state_dict().items()}
    yield _task
    after = _task.net.state_dict()
    changed = [
        name for name, value in before.items() if name not in after or not torch.equal(value, after[name])
    ]
    _task.net.load_state_dict(before)
    assert not changed, f"the test changed the network: {changed}"


@pytest.fixture
def registered() -> Iterator[Callable[[], None]]:
    """For tests that unregister: whatever happens, CAT is registered afterwards."""
    yield cat_plugin.unregister
    cat_plugin.unregister()
    from cat_plugin.hosts import register

    register()
