"""Many images without and few with labels: data, encoder and linear probe of self-supervised recipes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..models.vision_transformer import Encoder
from ..study.study import ComparisonConfig
from .images import ImageData, load_images, take_per_class

NUM_VALIDATION = 2000


@dataclass(kw_only=True)
class FewLabelsConfig(ComparisonConfig):
    """What the configurations of self-supervised recipes share.

    Args:
        data: The images.
        num_unlabelled: Images for pretraining; those with labels are added to them.
        num_labelled_per_class: Images with a label, of each class.
        score_on: ``test`` images count, or for the choice of settings, ``validation``: training images that nothing
            else uses.
        patch_size: Height and width of a patch of the encoder.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        masked: Part of the patches that is masked.
        batch_size: Images per step.

    Raises:
        ValueError: If ``masked`` is not between 0 and 1.
    """

    data: ImageData = "fashion_mnist"
    num_unlabelled: int = 2000
    num_labelled_per_class: int = 50
    score_on: Literal["test", "validation"] = "test"
    patch_size: int = 7
    dim: int = 32
    depth: int = 2
    masked: float = 0.75
    batch_size: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked < 1:
            raise ValueError(f"masked={self.masked} must be between 0 and 1, both excluded")

    def encoder(self, image_size: int) -> Encoder:
        """An encoder for images of a size."""
        return Encoder(image_size, self.patch_size, self.dim, self.depth)

    def num_masked(self, num_patches: int) -> int:
        """How many of the patches are masked; at least one is, and one is not."""
        return min(max(round(self.masked * num_patches), 1), num_patches - 1)


@dataclass
class Split:
    """Images; all parts but ``unlabelled`` with labels. ``labelled`` is made of ``first`` and ``second``."""

    unlabelled: TensorDataset
    labelled: TensorDataset
    first: TensorDataset
    second: TensorDataset
    scored: TensorDataset

    @property
    def image_size(self) -> int:
        """Height and width."""
        return self.unlabelled.tensors[0].shape[-1]


_images = cache(load_images)  # decoding takes longer than a short arm


def split(config: FewLabelsConfig, seed: int) -> Split:
    """Draw the parts.

    Args:
        config: The configuration.
        seed: Draws.

    Returns:
        Them.

    Raises:
        ValueError: If there are too few images.
    """
    images = _images(config.data)
    generator = torch.Generator().manual_seed(seed)
    everything, count = torch.arange(len(images.train_y)), config.num_labelled_per_class
    rows, left = take_per_class(images.train_y, everything, [count] * 10, generator)
    if len(left) <= config.num_unlabelled:
        raise ValueError(
            f"num_unlabelled={config.num_unlabelled} must be smaller than the number of images of {config.data} that "
            f"are left, {len(left)}; ask for fewer"
        )
    first, second = take_per_class(images.train_y, rows, [(count + 1) // 2] * 10, generator)
    unlabelled, rest = left[: config.num_unlabelled], left[config.num_unlabelled :][:NUM_VALIDATION]

    def labelled(chosen: Tensor) -> TensorDataset:
        return TensorDataset(images.train_x[chosen], images.train_y[chosen])

    test = TensorDataset(images.test_x, images.test_y)
    return Split(
        TensorDataset(images.train_x[torch.cat([unlabelled, rows])]),
        *map(labelled, (rows, first, second)),
        test if config.score_on == "test" else labelled(rest),
    )


def loader(config: FewLabelsConfig, data: TensorDataset) -> DataLoader:
    """Shuffled batches, the whole of what is smaller than one."""
    return DataLoader(data, min(config.batch_size, len(data)), shuffle=True, drop_last=True)


@torch.no_grad()
def probe_accuracy(features: Callable[[Tensor], Tensor], data: Split, batch_size: int = 500) -> float:
    """Accuracy of logistic regression on standardised features, trained on all labelled images.

    Args:
        features: From images to ``[B, D]``.
        data: Images.
        batch_size: Images at once.

    Returns:
        A number in [0, 1].
    """
    from sklearn.linear_model import LogisticRegression

    found = [
        torch.cat([features(x) for x in part.tensors[0].split(batch_size)]) for part in (data.labelled, data.scored)
    ]
    mean, deviation = found[0].mean(0), found[0].std(0).clamp_min(1e-6)
    train, scored = (((x - mean) / deviation).cpu().numpy() for x in found)
    probe = LogisticRegression(max_iter=2000).fit(train, data.labelled.tensors[1].numpy())
    return float(probe.score(scored, data.scored.tensors[1].numpy()))
