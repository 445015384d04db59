"""The same next batch after a resume."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from scalemlo.loop.batches import BatchStream
from tests.checkpoint.programs import differences
from tests.ranks import run_ranks


class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.tensor(i)


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(20))


class Stateful:
    """Keeps its position itself."""

    def __init__(self):
        self.at, self.num_given = 0, 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            self.num_given += 1
            yield torch.tensor([self.at, self.at])
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


LOADERS = {
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "generator": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "replacement": lambda: DataLoader(Numbers(), batch_size=4, sampler=RandomSampler(range(20), replacement=True)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(RandomSampler(range(20)), 4, True)),
    "workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2),
    "iterable dataset": lambda: DataLoader(Streamed(), batch_size=4),
    "list": lambda: [torch.tensor([i, i]) for i in range(5)],
    "stateful": Stateful,
    "distributed": lambda: DataLoader(Numbers(), batch_size=4, sampler=DistributedSampler(Numbers(), 2, 0, seed=1)),
}


def stream(kind, seed=7):
    return BatchStream(LOADERS[kind](), level="low", device=torch.device("cpu"), seed=seed)


@pytest.mark.parametrize("kind", LOADERS)
def test_positions(kind):
    num = 4 if kind == "workers" else 17
    straight = stream(kind)
    states, batches = [straight.state_dict()], []
    for _ in range(num):
        batches.append(straight.next().tolist())
        states.append(straight.state_dict())
    for position in (0, 1, 3) if kind == "workers" else range(12):
        fresh = stream(kind, seed=99)
        fresh.next()
        fresh.load_state_dict(states[position])
        assert [fresh.next().tolist() for _ in range(num - position)] == batches[position:]
        assert differences(states[num], fresh.state_dict()) == []
    assert len({str(b) for b in batches}) > 3


def test_going_forward_loads_nothing():
    class Counted(Numbers):
        num_loaded = 0

        def __getitem__(self, i):
            Counted.num_loaded += 1
            return super().__getitem__(i)

    def make():
        loader = DataLoader(Counted(), batch_size=4, shuffle=True)
        return BatchStream(loader, level="low", device=torch.device("cpu"), seed=7)

    straight = make()
    for _ in range(4):
        straight.next()
    kept, Counted.num_loaded = straight.state_dict(), 0
    fresh = make()
    fresh.load_state_dict(kept)
    assert Counted.num_loaded == 0
    assert torch.equal(fresh.next(), straight.next())


def test_stateful_data_is_not_iterated_again():
    straight, fresh = stream("stateful"), stream("stateful")
    for _ in range(3):
        straight.next()
    fresh.load_state_dict(straight.state_dict())
    assert fresh.next().tolist() == [4, 4]
    assert fresh._data.num_given == 1


def test_positions_on_other_world_sizes():
    def body(rank, world_size, kept, num):
        batches = BatchStream(LOADERS["shuffled"](), level="low", device=torch.device("cpu"), seed=7)
        for _ in range(3 if kept is None else 0):
            batches.next()
        if kept is not None:
            batches.load_state_dict(kept)
        return batches.state_dict(), [batches.next().tolist() for _ in range(num)]

    kept, expected = run_ranks(body, 1, None, 5, init_process_group=False)[0]
    found = [part for _, part in run_ranks(body, 2, kept, 5)]
    assert [a + b for a, b in zip(*found, strict=True)] == expected
    kept = run_ranks(body, 2, None, 0)[0][0]
    assert run_ranks(body, 1, kept, 5, init_process_group=False)[0][1] == expected


def test_stateful_data_on_other_world_sizes():
    datasets = pytest.importorskip("datasets")

    def hugging_face():
        rows = datasets.Dataset.from_dict({"x": list(range(24))})
        return rows.to_iterable_dataset(num_shards=2).batch(4).with_format("torch")

    def body(rank, world_size, make, kept, num):
        batches = BatchStream(make(), level="low", device=torch.device("cpu"), seed=7)
        if kept is None:
            batches.next()
            batches.next()
        else:
            batches.load_state_dict(kept)
        taken = [batches.next() for _ in range(num)]
        return batches.state_dict(), [(b["x"] if isinstance(b, dict) else b).tolist() for b in taken]

    for make in (Stateful, hugging_face):
        kept, _ = run_ranks(body, 2, make, None, 0)[0]
        _, expected = run_ranks(body, 1, make, None, 7, init_process_group=False)[0]
        assert run_ranks(body, 1, make, kept, 7, init_process_group=False)[0][1] == expected
        found = [parts for _, parts in run_ranks(body, 2, make, kept, 7)]
        assert [a + b for a, b in zip(*found, strict=True)] == expected
