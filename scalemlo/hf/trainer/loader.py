"""Loaders of the trainers: every epoch is whole optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from ..data.prepared import PreparedDataset
from .config import ReweightingConfig


class WholeSteps(Sampler):
    """Shuffled positions, as many as whole optimizer steps take, so that epochs do not depend on how steps are divided.

    Args:
        size: Examples.
        per_step: Examples per optimizer step.
        shuffle: Whether every epoch has another order.
        seed: Of the orders.
    """

    def __init__(self, size: int, per_step: int, *, shuffle: bool, seed: int):
        self._size, self._num_used = size, size - size % per_step
        self._shuffle = shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._num_used

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._size, generator=self.generator) if self._shuffle else torch.arange(self._size)
        return iter(order[: self._num_used].tolist())


def make_loader(
    args: ReweightingConfig, dataset: PreparedDataset, batch_size: int, per_step: int, collate: Callable
) -> DataLoader:
    """A loader of global batches, shuffled as ``args`` say.

    Args:
        args: Of the trainer.
        dataset: The rows.
        batch_size: Examples per micro-batch, over all processes.
        per_step: Examples per optimizer step.
        collate: Makes a batch of a list of rows.

    Returns:
        The loader.

    Raises:
        ValueError: If there are fewer examples than a step takes.
    """
    if len(dataset) < per_step:
        raise ValueError(
            f"{dataset.name} has {len(dataset)} examples, one step takes {per_step} (per-device batch size x "
            f"{args.world_size} processes x gradient accumulation): lower the batch size."
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = WholeSteps(len(dataset), per_step, shuffle=args.train_sampling_strategy == "random", seed=seed)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),  # of worker seeds: the global one is the model's
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
