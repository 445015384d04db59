"""Small images with labels, for recipes that train on a CPU in a minute."""

import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...runs.assets import fetch

ImageData = Literal["fashion_mnist", "digits"]
"""``fashion_mnist`` is fetched once; ``digits`` is part of scikit-learn."""

NUM_DIGITS_TEST = 500


@dataclass(frozen=True)
class Images:
    """Images ``[N, 1, H, W]`` in fp32, mean 0 and deviation 1 over the training part, and labels ``[N]`` below 10."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def size(self) -> int:
        """Height and width."""
        return self.train_x.shape[-1]


def load_images(name: ImageData) -> Images:
    """Load one of the data sets.

    Args:
        name: ``fashion_mnist``: 60,000 and 10,000 images of 28 x 28; ``digits``: 1,297 and 500 of 8 x 8.

    Returns:
        Training and test images.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        parts = order[NUM_DIGITS_TEST:], order[:NUM_DIGITS_TEST]
        x, y = [images[part].reshape(-1, 8, 8) for part in parts], [labels[part] for part in parts]
    else:
        folder = fetch(name)
        x = [_read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")]
        y = [_read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
    mean, deviation = float(x[0].mean()), float(x[0].std())
    train_x, test_x = (torch.tensor((part - mean) / deviation, dtype=torch.float32).unsqueeze(1) for part in x)
    return Images(train_x, torch.tensor(y[0]).long(), test_x, torch.tensor(y[1]).long())


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8), the number of dimensions, sizes, values."""
    with gzip.open(path) as file:
        content = file.read()
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(sizes)).astype(np.float32)


def take_per_class(
    labels: Tensor, rows: Tensor, counts: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw some rows of every class.

    Args:
        labels: Of all examples.
        rows: To draw from.
        counts: How many of each class; fewer where there are not as many.
        generator: Draws.

    Returns:
        The rows that were drawn, shuffled, and those that are left.
    """
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    chosen = torch.cat([shuffled[labels[shuffled] == c][:n] for c, n in enumerate(counts)])
    left = shuffled[~torch.isin(shuffled, chosen)]
    return chosen[torch.randperm(len(chosen), generator=generator)], left


class SmallCNN(nn.Module):
    """Two convolutions of stride 2 and a linear layer.

    Args:
        size: Of the images.
        num_classes: Number of outputs.
    """

    def __init__(self, size: int, num_classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        side = math.ceil(math.ceil(size / 2) / 2)
        self.head = nn.Linear(32 * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, 1, size, size]``."""
        return self.head(self.features(images))


@torch.no_grad()
def accuracy(
    classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, batch_size: int = 2000
) -> float:
    """Share of images that are classified rightly.

    Args:
        classifier: Gives logits.
        images: ``[N, 1, H, W]``.
        labels: ``[N]``.
        batch_size: Images at once.

    Returns:
        A number in [0, 1].
    """
    right = [
        (classifier(x).argmax(1) == y).sum()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return float(sum(right)) / len(labels)
