"""Models by name, with libraries that stand in for the real ones where these are not installed."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cat_plugin.cli.models import load_model
from cat_plugin.errors import CATValueError


class Tiny(torch.nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, num_classes)

    def forward(self, x: Any) -> Any:
        return self.fc(x)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool, **options: int) -> Tiny:
        assert not pretrained
        return Tiny(**options)

    def get_model(name: str, weights: None, **options: int) -> Tiny:
        assert weights is None
        return Tiny(**options)

    names = ["resnet18", "resnet34", "vit_b_16"]
    stand_in(monkeypatch, "timm", list_models=lambda: names, create_model=create_model)
    stand_in(monkeypatch, "torchvision")
    stand_in(monkeypatch, "torchvision.models", list_models=lambda: names, get_model=get_model)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(Tiny(3).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("prefix", ["timm", "torchvision"])
@pytest.mark.usefixtures("libraries")
def test_named_models_take_local_weights(prefix: str, weights: Path) -> None:
    model = load_model(f"{prefix}:resnet18", weights, num_classes=3)
    assert not model.training
    from safetensors.torch import load_file

    assert torch.equal(model.state_dict()["fc.bias"], load_file(weights)["fc.bias"])
    with pytest.raises(CATValueError, match="do not fit"):
        load_model(f"{prefix}:resnet18", weights)
    with pytest.raises(CATValueError, match="nothing is downloaded"):
        load_model(f"{prefix}:resnet18")
    with pytest.raises(CATValueError, match="did you mean 'resnet"):
        load_model(f"{prefix}:resnet19", weights)
    with pytest.raises(CATValueError, match="3 others"):
        load_model(f"{prefix}:zzzz", weights)


def test_hugging_face_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Classifier(Tiny):
        def forward(self, x: Any) -> Any:
            return SimpleNamespace(logits=self.fc(x))

        @classmethod
        def from_pretrained(cls, folder: Path, **options: Any) -> Classifier:
            seen.update(options, folder=folder)
            return cls()

    stand_in(monkeypatch, "transformers", AutoModelForImageClassification=Classifier)
    with pytest.raises(CATValueError, match=r"config\.json"):
        load_model(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    model = load_model(f"hf:{tmp_path}")
    assert model(torch.zeros(2, 4)).shape == (2, 10)
    assert seen == {"folder": tmp_path, "local_files_only": True, "use_safetensors": True}


@pytest.mark.parametrize(
    ("prefix", "package"), [("timm", "timm"), ("torchvision", "torchvision"), ("hf", "transformers")]
)
def test_missing_library(monkeypatch: pytest.MonkeyPatch, weights: Path, prefix: str, package: str) -> None:
    from cat_plugin.cli import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CATValueError, match=f"pip install {package}"):
        load_model(f"{prefix}:resnet18", weights)


def test_classes_are_for_named_models(weights: Path) -> None:
    with pytest.raises(CATValueError, match="--num-classes is for"):
        load_model("my_model:build", weights, num_classes=3)


def test_real_torchvision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("torchvision:squeezenet1_1", tmp_path / "w.safetensors", num_classes=5)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    """A torchvision of another release than torch's is there, and fails with a RuntimeError."""
    from cat_plugin.cli import models

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(models.importlib, "import_module", broken)
    with pytest.raises(CATValueError, match="cannot be imported"):
        load_model("torchvision:resnet18", weights)


def test_weights_that_do_not_fit_are_counted_and_five_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file
    from torch import nn

    path = tmp_path / "w.safetensors"
    state = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))).state_dict()
    shifted = {name.replace("0.", "a.", 1) if name.startswith("0.") else name: v for name, v in state.items()}
    shifted["8.bias"] = torch.zeros(3)
    save_file({**shifted, **{f"more.{i}": torch.zeros(1) for i in range(90)}}, path)
    (tmp_path / "nine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CATValueError) as caught:
        load_model("nine:build", path)
    message = str(caught.value)
    assert "2 are missing (0.weight, 0.bias)" in message
    assert "92 are not the model's (" in message
    assert "1 is of another shape (8.bias)" in message
    assert message.count("more.") <= 5
