"""Batches: endless, global, split over the ranks, on the device."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import BatchEncoding

from scalemlo.loop.batches import BatchStream, batch_size, map_tensors
from tests.ranks import run_ranks

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["x", "y"])


class Numbers(Dataset):
    """Example i is the number i, and its name."""

    def __init__(self, length=16):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return {"i": torch.tensor(i), "name": f"example {i}"}


class Streamed(IterableDataset):
    def __init__(self, length=16):
        self.length = length

    def __iter__(self):
        return ((torch.tensor(i), f"example {i}") for i in range(self.length))


def stream(data, seed=0):
    return BatchStream(data, level="low", device=CPU, seed=seed)


def taken(batches: BatchStream, count: int) -> list[list[int]]:
    """The example numbers of the next batches, and a check that names went with them."""
    found = []
    for _ in range(count):
        batch = batches.next()
        numbers, names = (batch["i"], batch["name"]) if isinstance(batch, dict) else batch
        assert list(names) == [f"example {i}" for i in numbers.tolist()]
        found.append(numbers.tolist())
    return found


# ---- one process ---------------------------------------------------------------------------------------------------
def test_lists_are_cycled():
    batches = stream([torch.tensor([1]), torch.tensor([2])])
    assert [int(batches.next()) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert batches.epoch == 2
    assert batches.num_batches == 5


def test_generators_end_with_an_error():
    batches = stream(torch.tensor([i]) for i in range(2))
    assert [int(batches.next()) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="'low': data was exhausted after 2 batches.*DataLoader or a list"):
        batches.next()


@pytest.mark.parametrize("data", [[], iter(()), DataLoader(Streamed(0), batch_size=2)])
def test_data_without_a_batch(data):
    with pytest.raises(ValueError, match="'low': data is empty, it gave no batch"):
        stream(data).next()


def test_empty_loaders_are_found_at_construction():
    with pytest.raises(ValueError, match=r"'low': data is empty: 3 example\(s\) with batch size 4 and drop_last=True"):
        stream(DataLoader(Numbers(3), batch_size=4, drop_last=True))


def test_epochs_shuffle_anew_and_repeat_with_the_seed():
    runs = [taken(stream(DataLoader(Numbers(), batch_size=4, shuffle=True), seed=seed), 8) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    epochs = [sum(runs[0][:4], []), sum(runs[0][4:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(16)),
        SubsetRandomSampler(range(16)),
        WeightedRandomSampler(torch.ones(16).tolist(), 16),
        BatchSampler(RandomSampler(range(16)), 4, drop_last=False),
    ],
    ids=lambda s: type(s).__name__,
)
def test_shuffling_leaves_the_global_generator_alone(sampler):
    """Dropout must not depend on the data, nor the order of the data on the state that dropout left."""
    where = "batch_sampler" if isinstance(sampler, BatchSampler) else "sampler"
    options = {where: sampler} | ({} if where == "batch_sampler" else {"batch_size": 4})
    before = torch.get_rng_state()
    taken(stream(DataLoader(Numbers(), **options)), 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_users_is_kept():
    def order(seed):
        loader = DataLoader(Numbers(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
        return taken(stream(loader, seed=seed), 1)

    assert order(1) == order(2)


CONTAINERS = {
    "tensor": torch.arange(4),
    "tuple": (torch.arange(4), torch.arange(4.0)),
    "named tuple": Pair(torch.arange(4), {"deep": [torch.arange(4)]}),
    "dict": {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "flag": True, "none": None},
    "BatchEncoding": BatchEncoding({"input_ids": torch.ones(4, 2), "names": list("abcd")}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_keep_their_type(kind):
    batch = stream([CONTAINERS[kind]]).next()
    assert type(batch) is type(CONTAINERS[kind])
    assert batch_size(batch) == 4
    doubled = map_tensors(lambda t: t * 2, CONTAINERS[kind])
    assert type(doubled) is type(CONTAINERS[kind])
    assert not any(doubled is x for x in CONTAINERS.values())


def test_values_that_are_no_tensors_stay():
    batch = stream([CONTAINERS["dict"]]).next()
    assert (batch["names"], batch["flag"], batch["none"]) == (["a", "b", "c", "d"], True, None)


def test_tensors_go_to_the_device():
    batch = BatchStream([CONTAINERS["named tuple"]], level="low", device=torch.device("meta"), seed=0).next()
    assert batch.x.device.type == batch.y["deep"][0].device.type == "meta"


def test_batch_size_looks_for_the_first_dimension():
    assert batch_size({"temperature": torch.tensor(0.5), "x": torch.ones(3, 2)}) == 3
    assert batch_size({"temperature": torch.tensor(0.5), "text": ["a"]}) is None


# ---- two ranks -------------------------------------------------------------------------------------------------------
LOADERS = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Numbers(18), batch_size=4, shuffle=True, drop_last=True),
    "even last batch": lambda: DataLoader(Numbers(18), batch_size=4),
    "workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=1),
    "subset": lambda: DataLoader(Numbers(), batch_size=4, sampler=SubsetRandomSampler(range(3, 15))),
    "weighted": lambda: DataLoader(Numbers(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 16, 16)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(16)), 4, False)),
    "iterable dataset": lambda: DataLoader(Streamed(), batch_size=4),
    "own batches": lambda: DataLoader([{"i": torch.arange(4 * k, 4 * k + 4),
                                        "name": [f"example {i}" for i in range(4 * k, 4 * k + 4)]} for k in range(4)],
                                      batch_size=None),
}  # fmt: skip


def orders(rank=0, world_size=1):
    torch.manual_seed(rank)  # ranks differ in their global generators, as they do under dropout
    return {name: taken(stream(build(), seed=3), 6) for name, build in LOADERS.items()}


def distributed_order(rank, world_size):
    sampler = DistributedSampler(Numbers(), num_replicas=world_size, rank=rank, shuffle=True, seed=2)
    loaders = [DataLoader(Numbers(), batch_size=2, sampler=sampler),
               DataLoader(Numbers(), batch_sampler=BatchSampler(sampler, 2, False))]  # fmt: skip
    return [taken(stream(loader), 8) for loader in loaders]


def split_containers(rank, world_size):
    batches = {
        **CONTAINERS,
        "tuple of strings": (torch.arange(4), ("a", "b", "c", "d")),
        "two dicts": [{"x": torch.arange(2)}, {"x": torch.arange(2) + 10}],
        "shared tensors": {"x": torch.arange(4), "prior": torch.ones(3), "temperature": torch.tensor(2.0)},
        "only text": ["a", "b", "c", "d"],
        "dict of text": {"text": ["a", "b", "c", "d"]},
    }
    return {name: stream([batch]).next() for name, batch in batches.items()}


def errors(rank, world_size):
    messages = {}
    for name, data in {
        "small": [torch.ones(1)],
        "uneven": [torch.ones(3)],
        "small loader": DataLoader(Numbers(4), batch_size=1),
        "uneven loader": DataLoader(Numbers(9), batch_size=3),
        "uneven last": DataLoader(Numbers(9), batch_size=4),
        "uneven stream": DataLoader(Streamed(9), batch_size=3),
    }.items():
        when = "construction"
        try:
            batches = stream(data)
            when = "use"
            batches.next()
        except ValueError as error:
            messages[name] = when, str(error)
    return messages


def on_two_ranks(rank, world_size):
    return (
        orders(rank, world_size),
        distributed_order(rank, world_size),
        split_containers(rank, world_size),
        errors(rank, world_size),
    )


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_two_ranks, 2)


@pytest.mark.parametrize("name", LOADERS)
def test_the_union_of_the_ranks_is_the_batch_of_one_process(ranks, name):
    """Also in the same order: example k of the global batch is the same one."""
    (first, *_), (second, *_) = ranks
    assert [a + b for a, b in zip(first[name], second[name], strict=True)] == orders()[name]


def test_distributed_samplers_are_split_already(ranks):
    for first, second in zip(ranks[0][1], ranks[1][1], strict=True):
        assert [len(part) for part in first] == [2] * 8
        for epoch in (slice(0, 4), slice(4, 8)):
            assert sorted(sum(first[epoch], []) + sum(second[epoch], [])) == list(range(16))
        assert first[:4] != first[4:]  # set_epoch was called: epochs are shuffled anew


def test_containers_are_split(ranks):
    for rank, (_, _, parts, _) in enumerate(ranks):
        rows = slice(2 * rank, 2 * rank + 2)
        share, letters = torch.arange(4)[rows], list("abcd")[rows]
        assert torch.equal(parts["tensor"], share)
        assert type(parts["tuple"]) is tuple and all(torch.equal(t.long(), share) for t in parts["tuple"])
        assert torch.equal(parts["named tuple"].x, share) and torch.equal(parts["named tuple"].y["deep"][0], share)
        assert torch.equal(parts["dict"]["x"], share) and parts["dict"]["names"] == letters
        assert parts["dict"]["flag"] is True
        assert type(parts["BatchEncoding"]) is BatchEncoding
        assert parts["BatchEncoding"]["input_ids"].shape == (2, 2) and parts["BatchEncoding"]["names"] == letters
        assert torch.equal(parts["tuple of strings"][0], share)
        assert parts["tuple of strings"][1] == tuple(letters)
        assert [d["x"].tolist() for d in parts["two dicts"]] == [[rank], [rank + 10]]
        assert parts["shared tensors"]["prior"].shape == (3,) and float(parts["shared tensors"]["temperature"]) == 2


def test_batches_of_text_alone_are_split(ranks):
    for rank, (_, _, parts, _) in enumerate(ranks):
        letters = list("abcd")[2 * rank : 2 * rank + 2]
        assert parts["only text"] == letters
        assert parts["dict of text"] == {"text": letters}


@pytest.mark.parametrize(
    ("name", "when", "message"),
    [
        ("small", "use", "'low': a batch of 1 example(s) is smaller than the number of ranks (2)"),
        ("uneven", "use", "'low': a batch of 3 examples cannot be split evenly over 2 ranks"),
        ("small loader", "construction", "'low': a batch of 1 example(s) is smaller than the number of ranks (2)"),
        ("uneven loader", "construction", "'low': a batch of 3 examples cannot be split evenly over 2 ranks"),
        ("uneven last", "construction", "'low': a batch of 1 example(s) is smaller than the number of ranks (2)"),
        ("uneven stream", "use", "'low': a batch of 3 examples cannot be split evenly over 2 ranks"),
    ],
)
def test_batches_that_cannot_be_split(ranks, name, when, message):
    for *_, messages in ranks:
        assert messages[name][0] == when
        assert messages[name][1].startswith(f"level {message}")


def test_values_are_tensors_after_collating():
    """The loader's own collate function is the one that is used."""
    loader = DataLoader(Numbers(), batch_size=4, collate_fn=lambda rows: torch.stack([r["i"] for r in rows]) * 10)
    (batch,) = [stream(loader).next()]
    assert isinstance(batch, Tensor) and batch.tolist() == [0, 10, 20, 30]
