"""The models and the data that every benchmark shares: ResNet-20, MobileNetV2, ResNet-18,
EfficientNet-Lite0 and two image sets; transformers are in :mod:`benchmarks.encoders`.

Nothing here imports the project, so that the scripts of the peers can use it from environments of their own;
it needs torch, numpy, safetensors and, for the ImageNet sample, Pillow. Weights and images are not part of the
project: they lie beside the checkout, in ``../shared/data``, or where ``root`` says.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import BasicBlock, CifarResNet, MobileNetV2, ResNet18

__all__ = [
    "DATA_ROOT",
    "ENCODERS",
    "IMAGENET_INPUTS",
    "INPUT_SHAPES",
    "MODELS",
    "Split",
    "cifar10",
    "data_root",
    "efficientnet_lite0",
    "example_of",
    "imagenet",
    "labelled_images",
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "split_of",
    "top1",
]

DATA_ROOT = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder that holds ``cifar10/`` and ``imagenet_sample/``.

    Parameters
    ----------
    root
        The folder; None for ``../shared/data`` beside the checkout.

    Returns
    -------
    Path
        An existing folder.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    folder = (DATA_ROOT if root is None else Path(root)).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no benchmark data in {folder}: give the folder that holds cifar10/ and imagenet_sample/"
        )
    return folder


def resnet20(root: str | Path | None = None) -> nn.Module:
    """Return the trained CIFAR-10 ResNet-20 in evaluation mode.

    Parameters
    ----------
    root
        The folder of the data, as for `data_root`.

    Returns
    -------
    nn.Module
        Takes float32 (N, 3, 32, 32), gives logits (N, 10); 86.475 % top-1 on the evaluation split.
    """
    model = CifarResNet()
    model.load_state_dict(load_file(data_root(root) / "cifar10" / "resnet20.safetensors"))
    return model.eval()


def mobilenet_v2(root: str | Path | None = None) -> nn.Module:
    """Return the trained MobileNetV2 1.0 224 in evaluation mode, BatchNorm folded.

    Parameters
    ----------
    root
        The folder of the data, as for `data_root`.

    Returns
    -------
    nn.Module
        Takes float32 (N, 3, 224, 224) in -1..1, gives logits (N, 1001), index 0 being background.
    """
    model = MobileNetV2()
    model.load_state_dict(load_file(data_root(root) / "imagenet_sample" / "mobilenet_v2.safetensors"))
    return model.eval()


@torch.no_grad()
def resnet18(root: str | Path | None = None, seed: int = 0) -> nn.Module:
    """Return a ResNet-18 with random weights whose activations are as large as a trained one's; for timing only.

    The last scale of each residual branch is 0.5 and the BatchNorm statistics are those of three random batches, so
    that no activation dies, explodes, or falls into a range that a quantizer would round to nothing.

    Parameters
    ----------
    root
        Not used: there are no weights to read; here so that every entry of `MODELS` is called alike.
    seed
        Seed of the weights and of the batches.

    Returns
    -------
    nn.Module
        In evaluation mode; takes float32 (N, 3, 224, 224), gives logits (N, 1000).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet18()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                module.momentum = None  # a plain mean over the batches
            elif isinstance(module, BasicBlock):
                nn.init.constant_(module.bn2.weight, 0.5)
        model.train()
        for _ in range(3):
            # Noise at a low resolution, enlarged: images are smooth, and white noise would average out.
            coarse = torch.randn(4, 3, 28, 28)
            model(F.interpolate(coarse, size=224, mode="bilinear") + 0.3 * torch.randn(4, 3, 224, 224))
    return model.eval()


def efficientnet_lite0(root: str | Path | None = None) -> nn.Module:
    """Return the trained EfficientNet-Lite0 in evaluation mode; its module lies beside its weights.

    Parameters
    ----------
    root
        The folder of the data, as for `data_root`.

    Returns
    -------
    nn.Module
        Takes float32 (N, 3, 224, 224), (pixels - 127) / 128, gives logits (N, 1000).
    """
    source = data_root(root) / "efficientnet_lite0" / "efficientnet_lite0.py"
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", source)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no module {source}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.efficientnet_lite0()
    return network.eval()


def _encoder(name: str) -> Callable[..., Any]:
    """A function of :mod:`benchmarks.encoders`, which is imported when it is called."""

    def call(*arguments: Any) -> Any:
        from benchmarks import encoders

        return getattr(encoders, name)(*arguments)

    return call


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
    "resnet18": resnet18,
    "vit_s": _encoder("vit_s"),
    "minilm": _encoder("minilm"),
}
ENCODERS: dict[str, Callable[..., Split]] = {
    "vit_s": _encoder("vit_s_images"),
    "minilm": _encoder("minilm_windows"),
}
"""Transformers, and what reads their inputs."""
INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "resnet20": (3, 32, 32),
    "mobilenet_v2": (3, 224, 224),
    "resnet18": (3, 224, 224),
    "efficientnet_lite0": (3, 224, 224),
    "vit_s": (3, 224, 224),
    "minilm": (128,),
}
IMAGENET_INPUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mobilenet_v2": (lambda pixels: pixels / 127.5 - 1, 1),
    "efficientnet_lite0": (lambda pixels: (pixels - 127) / 128, 0),
}
"""What a model makes of pixels in 0..255, and how many logits come before ImageNet's first class."""
_IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # the classes of its images


@dataclass(frozen=True)
class Split:
    """Images to calibrate on and images to evaluate on, as the models want them.

    Attributes
    ----------
    calibration, evaluation
        Normalised float32 images (N, 3, height, width), contiguous.
    calibration_labels, evaluation_labels
        int64 (N,), indices into the model's logits.
    """

    calibration: Tensor
    calibration_labels: Tensor
    evaluation: Tensor
    evaluation_labels: Tensor

    def batches(self, size: int = 64, limit: int | None = None) -> list[Tensor]:
        """Return the calibration images (the first `limit`) in batches of `size`."""
        return list(self.calibration[:limit].split(size))


def cifar10(root: str | Path | None = None) -> Split:
    """Read the CIFAR-10 images: 4096 of the training set to calibrate, 4000 of the test set to evaluate.

    Parameters
    ----------
    root
        The folder of the data, as for `data_root`.

    Returns
    -------
    Split
        Images of 32x32, normalised by channel; benchmarks calibrate on the first 1024.
    """
    folder = data_root(root) / "cifar10"
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def read(name: str) -> tuple[Tensor, Tensor]:
        arrays = np.load(folder / name)
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float().div_(255)
        return ((pixels - mean) / std).contiguous(), torch.from_numpy(arrays["labels"]).long()

    return Split(*read("calibration.npz"), *read("evaluation.npz"))


def imagenet(
    model: str = "mobilenet_v2",
    root: str | Path | None = None,
    calibration: int | None = None,
    evaluation: int | None = None,
) -> Split:
    """Read ImageNet images of 224x224 as a model wants them.

    To calibrate, one image of each of the 1000 classes in a seeded order; to evaluate, the ten classes of Imagenette. A
    network that was calibrated on the ten classes would be flattered by them.

    Parameters
    ----------
    model
        A key of `IMAGENET_INPUTS`; any other is given what MobileNetV2 is.
    root
        The folder of the data, as for `data_root`.
    calibration, evaluation
        How many; None for all (1000 and 2000).

    Returns
    -------
    Split
        Labels index the model's logits.
    """
    prepare, background = IMAGENET_INPUTS.get(model, IMAGENET_INPUTS["mobilenet_v2"])
    folder = data_root(root)
    order = np.random.default_rng(0).permutation(1000)

    def read(where: str, count: int | None, order: np.ndarray | None) -> tuple[Tensor, Tensor]:
        pixels, labels = labelled_images(folder / where, count, order)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        return prepare(images).contiguous(), torch.from_numpy(labels) + background

    return Split(
        *read("imagenet_sample/images", calibration, order), *read("imagenette/evaluation", evaluation, None)
    )


def labelled_images(
    folder: Path, count: int | None = None, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read the images that a folder's ``labels.csv`` lists.

    Parameters
    ----------
    folder
        Holds ``labels.csv`` with the columns file and class_index, and the images.
    count
        How many; None for all.
    order
        Which come first, as a permutation of the rows sorted by file; None leaves them sorted.

    Returns
    -------
    pixels : (N, H, W, 3) uint8
    labels : (N,) int64
    """
    from PIL import Image

    with (folder / "labels.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
    if order is not None:
        rows = [rows[i] for i in order]
    rows = rows[:count]
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")) for row in rows]
    stacked = np.stack(pixels) if pixels else np.zeros((0, 224, 224, 3), np.uint8)
    return stacked, np.array([int(row["class_index"]) for row in rows], np.int64)


def split_of(
    model: str,
    root: str | Path | None = None,
    calibration: int | None = None,
    evaluation: int | None = None,
) -> Split:
    """Return the first inputs that belong to a model: CIFAR-10 to ResNet-20, ImageNet to others (`imagenet`), text to MiniLM."""
    if model in ENCODERS:
        return ENCODERS[model](root, calibration, evaluation)
    if model != "resnet20":
        return imagenet(model, root, calibration, evaluation)
    whole = cifar10(root)
    return Split(
        whole.calibration[:calibration],
        whole.calibration_labels[:calibration],
        whole.evaluation[:evaluation],
        whole.evaluation_labels[:evaluation],
    )


def example_of(model: str) -> Tensor:
    """Return a batch of two made-up inputs of a model."""
    if model == "minilm":
        return torch.randint(1000, 20000, (2, *INPUT_SHAPES[model]))
    return torch.randn(2, *INPUT_SHAPES[model])


@torch.no_grad()
def top1(model: Callable[[Tensor], Any], images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Return the share of images, in percent, whose largest logit is at their label.

    Parameters
    ----------
    model
        Gives logits (N, C).
    images, labels
        (N, ...) and (N,).
    batch
        Images at a time.

    Returns
    -------
    float
        Percent.
    """
    right = sum(
        int((torch.as_tensor(model(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return 100.0 * right / len(labels)


def share(classes: Tensor, labels: Tensor) -> float:
    """Return how many of ``classes`` (N,) are those of ``labels``, in percent."""
    return round(100.0 * float((classes == labels).double().mean()), 3)


def top1_among_ten(model: str, logits: Tensor, labels: Tensor) -> float | None:
    """Return the top-1 of logits (N, C), in percent, where only Imagenette's ten classes can be answered; None if it has others."""
    if model not in IMAGENET_INPUTS:
        return None
    classes = torch.tensor(_IMAGENETTE) + IMAGENET_INPUTS[model][1]
    return share(classes[logits[:, classes].argmax(1)], labels)
