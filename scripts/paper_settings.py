"""Settings, methods, data and networks of `reproduce_paper.py`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.transforms.v2 import functional as vision

from hf_adafocal.data.tensor_rows import ImageRows, TensorRows, stack_images
from hf_adafocal.models import (
    GlobalPoolingCNNConfig,
    GlobalPoolingCNNForSequenceClassification,
    train_word_level_tokenizer,
)

ABLATIONS: dict[str, dict[str, Any]] = {  # of what holds AdaFocal back
    "adafocal_cap_5": {"loss": "adafocal", "gamma_max": 5.0},
    "adafocal_cap_100": {"loss": "adafocal", "gamma_max": 100.0},
    "adafocal_lambda_0.2": {"loss": "adafocal", "gamma_lambda": 0.2},
}
METHODS: dict[str, dict[str, Any]] = {  # arguments of the trainer
    "cross_entropy": {"loss": "cross_entropy"},
    "label_smoothing": {"loss": "label_smoothing", "smoothing": 0.05},
    "flsd_53": {"loss": "flsd_53"},
    "adafocal": {"loss": "adafocal"},
    "brier": {"loss": "brier"},
    "mmce": {"loss": "mmce"},
    "focal_3": {"loss": "focal", "focal_gamma": 3.0},
    "dual_focal": {"loss": "dual_focal", "dual_focal_gamma": 5.0},
    "inverse_focal": {"loss": "inverse_focal", "inverse_focal_gamma": 2.0},
    "aurc_regularised": {"loss": "aurc_regularised"},
    "adaptive_label_smoothing": {"loss": "adaptive_label_smoothing"},
    **ABLATIONS,
}
MAIN = ("cross_entropy", "label_smoothing", "flsd_53", "adafocal")
FIGURE = ("cross_entropy", "flsd_53", "adafocal")  # whose test curves are recorded
FIGURE_SETTINGS = ("small_texts", "cifar", "news")
NOISE, BLUR = 0.1, 1.0  # standard deviations: on pixels in [0, 1], and in pixels; both are level 5 of CIFAR-10-C

Parts = dict[str, Any]  # "train", "calibration", "test": (inputs, labels); "ood": {name: inputs}


@dataclass(frozen=True)
class Setting:
    """Data, network and training recipe of one experiment.

    Attributes:
        data: Name in `DATA`.
        network: Builds the network; fresh weights follow torch's seed.
        epochs: Passes over the training set.
        batch_size: Samples per step; it divides the small training sets, so that no batch is short.
        learning_rate: Of the optimizer.
        optimizer: "sgd" with momentum 0.9 and decay of the rate by ten at 3/7 and 5/7 of the run, or "adam".
        weight_decay: Of the optimizer.
        clip: Largest norm of the gradient.
        summed: The loss is the sum over the batch. It runs as its equivalent for SGD with the mean: learning rate
            times, and weight decay and `clip` divided by, the batch size.
        best_validation: Keep the epoch of highest validation accuracy, not the last one.
        curve_every: Epochs between readings of the test curve, for the figure alone.
        save_every: Epochs between checkpoints.
        image: Crop padding; None for other inputs.
        bf16: Train under autocast to bfloat16 where there is a GPU.
    """

    data: str
    network: Callable[[], nn.Module]
    epochs: int
    batch_size: int = 125
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    clip: float = 1.0
    summed: bool = False
    best_validation: bool = False
    curve_every: int = 1
    save_every: int = 20
    image: int | None = None
    bf16: bool = False

    @property
    def recipe(self) -> dict[str, float]:
        """Learning rate, weight decay and maximum gradient norm for the optimizer."""
        factor = self.batch_size if self.summed else 1
        return {
            "learning_rate": self.learning_rate * factor,
            "weight_decay": self.weight_decay / factor,
            "max_grad_norm": self.clip / factor,
        }

    def rows(self, parts: Parts, role: str, seed: int) -> TensorRows:
        """Return a split of the data as the trainer takes it."""
        inputs, labels = parts[role]
        if self.image is None:
            return TensorRows(inputs, labels, "input_ids" if self.data.startswith("news") else "features")
        train = role == "train"
        return ImageRows(inputs, labels, crop_padding=self.image if train else 0, horizontal_flip=train, seed=seed)


class SmallConvolutional(nn.Module):
    """Four 3 x 3 convolutions with batch normalisation, 16 to 64 channels, and global average pooling."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 64), num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index < 3 else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the logits of images, shape `(N, 10)`."""
        images = pixel_values.contiguous(memory_format=torch.channels_last)
        return {"logits": self.classifier(self.features(images).mean(dim=(2, 3)))}


class ResNet8(nn.Module):
    """He et al.'s three-stage network for CIFAR-10 with one block per stage (6n + 2 layers, n = 1) and 16 channels.

    Shortcuts subsample and pad with zeros (their option A).
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = (width, width, 2 * width, 4 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if before == after else 2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
            )
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the logits of images, shape `(N, 10)`."""
        images = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            residual = block(images)
            if residual.shape != images.shape:
                images = images[:, :, ::2, ::2]
                images = nn.functional.pad(images, (0, 0, 0, 0, 0, residual.shape[1] - images.shape[1]))
            images = torch.relu(images + residual)
        return {"logits": self.classifier(images.mean(dim=(2, 3)))}


class ResNet50(nn.Module):
    """He et al.'s ResNet-50 with the stem that is usual for images of 32 pixels: a 3 x 3 convolution, no pooling."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.network = resnet50(num_classes=num_classes)
        self.network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.network.maxpool = nn.Identity()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the logits of images, shape `(N, 10)`."""
        return {"logits": self.network(pixel_values.contiguous(memory_format=torch.channels_last))}


class Perceptron(nn.Module):
    """A perceptron with two hidden layers of 256 units and dropout of 0.1."""

    def __init__(self, num_features: int = 256, num_classes: int = 20) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(num_features, 256), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1)),
            nn.Linear(256, num_classes),
        )

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the logits of feature vectors, shape `(N, 20)`."""
        return {"logits": self.layers(features)}


def text_network() -> nn.Module:
    """Build the global-pooling CNN for 20 Newsgroups."""
    return GlobalPoolingCNNForSequenceClassification(GlobalPoolingCNNConfig(num_labels=20))


def images(folder: Path, seed: int, *, size: int, train: int, calibration: int) -> Parts:
    """Load two disjoint parts of CIFAR-10's training images and all its test images, `size` pixels wide."""
    raw = load_dataset(str(folder / "cifar10"))
    order = np.random.default_rng(seed).permutation(len(raw["train"]))
    chosen = {"train": raw["train"].select(order[:train]), "test": raw["test"]}
    chosen["calibration"] = raw["train"].select(order[train : train + calibration])
    parts: Parts = {
        role: (stack_images(part["img"], size), torch.tensor(part["label"][:])) for role, part in chosen.items()
    }
    parts["ood"] = corruptions(parts["test"][0], seed)
    return parts


def corruptions(pixels: Tensor, seed: int) -> dict[str, Tensor]:
    """Add Gaussian noise and Gaussian blur to images."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)) * 255 * NOISE
    noisy = (pixels + noise).round().clamp(0, 255).to(torch.uint8)
    return {"noise": noisy, "blur": vision.gaussian_blur(pixels, kernel_size=[9, 9], sigma=[BLUR, BLUR])}


def all_texts(folder: Path, seed: int) -> tuple[list[str], Tensor, list[str]]:
    """Load the texts and labels of 20 Newsgroups, train and test shuffled together, and the Reuters texts."""
    raw = load_dataset(str(folder / "20_newsgroups"))
    texts = [text for part in ("train", "test") for text in raw[part]["text"]]
    labels = torch.tensor([label for part in ("train", "test") for label in raw[part]["label"]])
    order = np.random.default_rng(seed).permutation(len(texts))
    reuters = load_dataset(str(folder / "reuters_r8"))["test"]["text"][:]
    return [texts[index] for index in order], labels[order], reuters


def text_features(folder: Path, seed: int, *, train: int, calibration: int, size: int = 256) -> Parts:
    """Compute latent semantic features: TF-IDF and truncated SVD, both fitted on the training texts.

    Held-out texts whose TF-IDF stands in an earlier part too (empty ones) are left out.
    """
    texts, labels, reuters = all_texts(folder, seed)
    words = TfidfVectorizer(sublinear_tf=True, min_df=3, stop_words="english")
    words.fit(texts[:train])
    frequencies = words.transform(texts)
    reduce = TruncatedSVD(size, random_state=seed).fit(frequencies[:train])
    keys = [digest(row.indices.tobytes() + row.data.tobytes()) for row in frequencies]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    held_out = [index for index in range(train, len(texts)) if first[keys[index]] == index]
    scale = np.sqrt(size)  # rows of length 1 become features of variance 1

    def features(rows: Any) -> Tensor:
        reduced = reduce.transform(rows)
        return torch.tensor(reduced / np.linalg.norm(reduced, axis=1, keepdims=True).clip(1e-9) * scale).float()

    chosen = {"train": np.arange(train), "calibration": held_out[:calibration], "test": held_out[calibration:]}
    parts: Parts = {role: (features(frequencies[rows]), labels[rows]) for role, rows in chosen.items()}
    parts["ood"] = {"reuters": features(words.transform(reuters))}
    return parts


def text_tokens(folder: Path, seed: int, *, length: int, calibration: int = 900) -> Parts:
    """Encode texts as token ids; the last 20 % are the test set, the 900 before them the validation set.

    Training texts with the tokens of a held-out one are left out.
    """
    texts, labels, reuters = all_texts(folder, seed)
    end = len(texts) - len(texts) // 5
    tokenizer = train_word_level_tokenizer(texts[: end - calibration], max_length=length)

    def ids(texts: list[str]) -> Tensor:
        return tokenizer(texts, truncation=True, padding="max_length", return_tensors="pt")["input_ids"]

    tokens = ids(texts)
    keys = [digest(row.numpy().tobytes()) for row in tokens]
    held_out = set(keys[end - calibration :])
    kept = [index for index in range(end - calibration) if keys[index] not in held_out]
    chosen = {"train": kept, "calibration": range(end - calibration, end), "test": range(end, len(texts))}
    parts: Parts = {role: (tokens[list(rows)], labels[list(rows)]) for role, rows in chosen.items()}
    parts["ood"] = {"reuters": ids(reuters)}
    return parts


def digest(content: bytes) -> bytes:
    """Compute a 128-bit hash of bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


DATA: dict[str, tuple[Callable[..., Parts], dict[str, int]]] = {
    "small_images": (images, {"size": 16, "train": 2500, "calibration": 2000}),
    "small_texts": (text_features, {"train": 6000, "calibration": 2000}),
    "small_texts_6000": (text_features, {"train": 6000, "calibration": 6000}),
    "news": (text_tokens, {"length": 128}),
    "news_300": (text_tokens, {"length": 300}),
    "cifar": (images, {"size": 32, "train": 10000, "calibration": 5000}),
    "cifar_45000": (images, {"size": 32, "train": 45000, "calibration": 5000}),
}
SMALL_IMAGES = {"data": "small_images", "network": SmallConvolutional, "epochs": 200, "image": 2, "curve_every": 10}
SMALL_TEXTS = {"data": "small_texts", "network": Perceptron, "epochs": 150, "curve_every": 5}
SUM = {"summed": True, "clip": 2.0}
NEWS = {
    "network": text_network, "epochs": 50, "batch_size": 128, "optimizer": "adam", "learning_rate": 1e-3,
    "weight_decay": 0.0, "best_validation": True, "save_every": 1,
}  # fmt: skip
SETTINGS: dict[str, Setting] = {
    "small_images": Setting(**SMALL_IMAGES),
    "small_images_sum": Setting(**SMALL_IMAGES, **SUM),
    "small_texts": Setting(**SMALL_TEXTS),
    "small_texts_sum": Setting(**SMALL_TEXTS, **SUM),
    "small_texts_6000": Setting(**SMALL_TEXTS | {"data": "small_texts_6000"}),
    "news": Setting("news", **NEWS),
    "news_300": Setting("news_300", **NEWS),
    "cifar": Setting("cifar", ResNet8, 150, 128, image=4, curve_every=5, save_every=1),
    "resnet50": Setting("cifar_45000", ResNet50, 350, 128, image=4, curve_every=10, save_every=5, bf16=True),
}
