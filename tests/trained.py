"""A small network trained on digits, with its data: what hosts, recipes and saved models are tried on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


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


class Loader:
    """The data loader that the host's documentation asks for."""

    def __init__(self, batches, labels=True):
        self.batches = batches
        self.labels = labels
        self.batch_size = len(batches[0])

    def __iter__(self):
        for batch in self.batches:
            yield (batch, torch.zeros(len(batch))) if self.labels else batch
