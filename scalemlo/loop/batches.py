"""Batches without end: cycled, split over ranks, moved to the device."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from ..distributed.group import rank, world_size


@dataclass(frozen=True)
class _Place:
    """A position in the data, as far as it is counted."""

    epoch: int
    num_batches: int
    position: int  # batches taken in this epoch
    has_begun: bool
    generators: list[Tensor]  # their states when the epoch began, or now if it has not


class BatchStream:
    """An endless stream of this rank's parts of a level's batches.

    Batches are global: every rank sees the same sequence and takes its 1/W along the first dimension, so that a run
    on W ranks follows the run on one. A map-style ``DataLoader`` is split at its sampler (each rank loads only its
    part) and its shuffling, if the user gave no generator, is seeded by the program; any other iterable is iterated on
    every rank and its batches are sliced. A loader with a ``DistributedSampler`` is taken as split already.

    Args:
        data: The iterable.
        level: Name for messages.
        device: Where to put tensors.
        seed: Seed of the shuffling.

    Raises:
        ValueError: If the loader is empty, or its batches cannot be split evenly over the ranks.
    """

    def __init__(self, data: Iterable, *, level: str, device: torch.device, seed: int):
        self._level, self._device = level, device
        self._sliced = True
        self._data: Any = data  # iterable; what else it can do is asked
        # Iterable Hugging Face datasets begin every epoch where the last `load_state_dict` put them.
        goes_back = _is_stateful(data) and type(data).__module__.startswith("datasets.")
        self._beginning = deepcopy(self._data.state_dict()) if goes_back else None
        self._samplers = _samplers(data)
        if isinstance(data, DataLoader):
            _check_length(data, level)
            _seed_shuffling(data, seed)
            if any(isinstance(sampler, DistributedSampler) for sampler in self._samplers):
                self._sliced = False
            elif world_size() > 1 and data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset):
                self._data, self._sliced = _rank_loader(data, level), False
        self._iterator: Iterator | None = None
        self._position = 0  # batches taken in this epoch
        self._at_start: list[Tensor] = []  # states of the shuffling generators when the epoch began
        self.epoch = -1
        self.num_batches = 0
        self._taken: list[tuple[Any, _Place]] = []  # since the mark, each with the place after it
        self._ahead: list[tuple[Any, _Place]] = []  # given back, to be taken again
        self._marked = self._here = self._place()  # where the mark is; where it stands while some are ahead

    def mark(self) -> None:
        """Batches that are taken from here on can be given back."""
        self._taken, self._marked = [], self._place()

    def give_back(self) -> None:
        """Stand at the mark again: the batches taken since are the next ones."""
        self._ahead[:0] = self._taken
        self._taken = []
        if self._ahead:
            self._stand_at(self._marked)

    def next(self) -> Any:
        """The next batch of this rank; a ``ValueError`` where the data is empty, exhausted or cannot be split."""
        if self._ahead:
            batch, place = self._ahead.pop(0)
            self._stand_at(place)
        else:
            batch = self._next_global()
            if self._sliced and world_size() > 1:
                batch = _take_part(batch, self._level)
            self.num_batches += 1
            batch = map_tensors(lambda t: t.to(self._device, non_blocking=True), batch)
        self._taken.append((batch, self._place()))
        return batch

    def _next_global(self) -> Any:
        for _ in range(2):
            iterator = self._iterator
            if iterator is None:
                self.epoch += 1
                if self._beginning is not None:
                    self._data.load_state_dict(deepcopy(self._beginning))
                iterator = self._begin_epoch(self._data)
            try:
                batch = next(iterator)
                self._position += 1
                return batch
            except StopIteration:
                self._iterator = None
        if self.num_batches == 0:
            raise ValueError(f"level {self._level!r}: data is empty, it gave no batch.")
        raise ValueError(
            f"level {self._level!r}: data was exhausted after {self.num_batches} batches and cannot be iterated again. "
            "Give a DataLoader or a list instead of a generator."
        )

    def _begin_epoch(self, data: Iterable) -> Iterator:
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._position, self._at_start = 0, [g.get_state() for g in self._generators()]
        self._iterator = iter(data)
        return self._iterator

    def _generators(self) -> list[torch.Generator]:
        """Where shuffling draws from, each once."""
        found = [getattr(source, "generator", None) for source in (self._data, *self._samplers)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    # ---- position ------------------------------------------------------------------------------------------------
    def _place(self) -> "_Place":
        if self._ahead:
            return self._here
        has_begun = self._iterator is not None
        generators = self._at_start if has_begun else [g.get_state() for g in self._generators()]
        return _Place(self.epoch, self.num_batches, self._position, has_begun, generators)

    def _stand_at(self, place: "_Place") -> None:
        self.epoch, self.num_batches, self._position = place.epoch, place.num_batches, place.position
        self._at_start, self._here = place.generators, place

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, in plain containers and tensors.

        It is the epoch, the generators' states when it began, and the number of batches taken since. Where the data
        keeps a position of its own (``state_dict`` and ``load_state_dict``, as torchdata's ``StatefulDataLoader`` and
        iterable Hugging Face datasets have), that one too.

        Raises:
            ValueError: If such data has already gone past batches that an error has given back.
        """
        if self._ahead and _is_stateful(self._data):
            raise ValueError(
                f"level {self._level!r}: an error ended a step, whose {len(self._ahead)} batch(es) the next one uses "
                "again; the position of the data is behind them. Call step() before saving."
            )
        return asdict(self._place()) | {"data": self._data.state_dict() if _is_stateful(self._data) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position.

        Data that keeps a position of its own is told; of a plain ``DataLoader`` over a map-style dataset, with batches,
        the sampler is run forward and nothing is loaded; anything else is iterated up to the position.

        Args:
            state: From :meth:`state_dict`, on this or another number of ranks.

        Raises:
            ValueError: If the shuffling draws from another number of generators.
        """
        generators = self._generators()
        if len(generators) != len(state["generators"]):
            raise ValueError(
                f"level {self._level!r}: the position in its data is that of a loader with {len(state['generators'])} "
                f"generator(s) to shuffle with, this one has {len(generators)}. Give it the data it had."
            )
        for generator, kept in zip(generators, state["generators"], strict=True):
            generator.set_state(kept)
        self._taken, self._ahead = [], []
        self.epoch, self.num_batches = state["epoch"], state["num_batches"]
        self._iterator, position = None, state["position"]
        keeps_position = state["data"] is not None and _is_stateful(self._data)
        if keeps_position:
            self._data.load_state_dict(state["data"])
        if not state["has_begun"]:
            return
        if keeps_position:
            self._begin_epoch(self._data)
        elif _has_plain_batches(self._data):
            self._begin_epoch(_with_batches(self._data, _Skipping(self._data.batch_sampler, position)))
        else:
            for _ in islice(self._begin_epoch(self._data), position):
                pass
        self._position = position


def _has_plain_batches(data: Any) -> bool:
    """Whether batches are loaded one by one, each for the indices that a batch sampler gives."""
    is_plain = type(data) is DataLoader and data.batch_sampler is not None
    return is_plain and not isinstance(data.dataset, IterableDataset)


def _is_stateful(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def map_tensors(fn, batch: Any) -> Any:
    """Apply a function to every tensor of a nested batch, keeping its types (``BatchEncoding`` too)."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        return _rebuilt(batch, {key: map_tensors(fn, value) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return _rebuilt(batch, [map_tensors(fn, value) for value in batch])
    return batch


def _rebuilt(like: Any, content: Any) -> Any:
    """A container of the same type: dict, BatchEncoding, tuple, named tuple, list."""
    return type(like)(*content) if hasattr(like, "_fields") else type(like)(content)


def batch_size(batch: Any) -> int | None:
    """Length of the first dimension of the first tensor that has one; None if there is no such tensor."""
    sizes: list[int] = []
    map_tensors(lambda t: sizes.append(t.shape[0]) if t.dim() else None, batch)
    return sizes[0] if sizes else None


def _take_part(batch: Any, level: str) -> Any:
    size = batch_size(batch)
    if size is None:
        size = _num_texts(batch)
    if size is None:
        return batch
    part = _part(size, level)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[part] if value.dim() and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return _rebuilt(value, {key: take(item) for key, item in value.items()})
        if type(value) in (list, tuple) and len(value) == size and not _has_tensor(value):
            return value[part]  # one entry per example: texts, identifiers
        if isinstance(value, (tuple, list)):
            return _rebuilt(value, [take(item) for item in value])
        return value

    return take(batch)


def _has_tensor(batch: Any) -> bool:
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return bool(found)


def _num_texts(batch: Any) -> int | None:
    """Length of the first list of strings in a batch; None if there is none."""
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(item, str) for item in batch):
        return len(batch)
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((n for n in map(_num_texts, inner) if n is not None), None)


def _part(size: int, level: str) -> slice:
    if size < world_size():
        raise ValueError(
            f"level {level!r}: a batch of {size} example(s) is smaller than the number of ranks ({world_size()}). "
            "Use a larger batch size or fewer processes."
        )
    if size % world_size():
        raise ValueError(
            f"level {level!r}: a batch of {size} examples cannot be split evenly over {world_size()} ranks. Make the "
            "batch size a multiple of the number of ranks, and set drop_last=True if the last batch is shorter."
        )
    share = size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


class _RankBatches:
    """The batch sampler of one rank: its part of each batch of another batch sampler."""

    def __init__(self, batches: Any, level: str):
        self._batches, self._level = batches, level

    def __iter__(self) -> Iterator[list]:
        for indices in self._batches:
            indices = list(indices)
            yield indices[_part(len(indices), self._level)]

    def __len__(self) -> int:
        return len(self._batches)


class _Skipping:
    """A batch sampler without its first batches."""

    def __init__(self, batches: Iterable, num_skipped: int):
        self._batches, self._num_skipped = batches, num_skipped

    def __iter__(self) -> Iterator[list]:
        return islice(iter(self._batches), self._num_skipped, None)


def _rank_loader(loader: DataLoader, level: str) -> DataLoader:
    sampler: Any = loader.batch_sampler
    if isinstance(sampler, BatchSampler):
        size, total = sampler.batch_size, len(sampler.sampler)
        _part(size, level)
        if not sampler.drop_last and total % size:
            _part(total % size, level)  # the last batch of an epoch, found out now instead of after an epoch
    return _with_batches(loader, _RankBatches(sampler, level))


def _with_batches(loader: DataLoader, batch_sampler: Iterable) -> DataLoader:
    """The same loader over other batches."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _check_length(loader: DataLoader, level: str) -> None:
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        return
    if len(loader) == 0:
        raise ValueError(
            f"level {level!r}: data is empty: {len(dataset)} example(s) with batch size {loader.batch_size} and "
            f"drop_last={loader.drop_last} give no batch."
        )


def _samplers(data: Any) -> list[Any]:
    """The samplers of a loader, also one inside a batch sampler."""
    if not isinstance(data, DataLoader):
        return []
    found = (data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _seed_shuffling(loader: DataLoader, seed: int) -> None:
    """Keep shuffling out of the global generator: ranks must agree, and dropout must not depend on the data."""
    if loader.generator is None:
        loader.generator = torch.Generator().manual_seed(seed)
    for sampler in _samplers(loader):
        if getattr(sampler, "generator", loader) is None:  # RandomSampler, SubsetRandomSampler, WeightedRandomSampler
            sampler.generator = torch.Generator().manual_seed(seed)
