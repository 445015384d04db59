"""Order and position of prepared data: group sampling, streams, and two ranks against one."""

import math
from collections import Counter

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from scalemlo.hf.data.collate import PadCollator
from scalemlo.hf.data.packing import PackingCollator
from scalemlo.hf.data.prepare import prepare_dataset
from scalemlo.hf.data.sampling import DomainSampler
from scalemlo.hf.data.streaming import StreamLoader
from scalemlo.hf.losses.next_token import example_losses
from scalemlo.loop.batches import BatchStream
from tests.hf.test_packing_data import llama
from tests.hf.words import PAD, word_tokenizer
from tests.ranks import run_ranks

CPU = torch.device("cpu")
DOMAIN_IDS = [0] * 40 + [1] * 8 + [2] * 2


def stream_of(data, seed=0) -> BatchStream:
    return BatchStream(data, level="low", device=CPU, seed=seed)


def taken(stream: BatchStream, count: int) -> list[list[int]]:
    return [stream.next()["example_id"].tolist() for _ in range(count)]


# Group sampling


def drawn(sampler: DomainSampler) -> list[Counter]:
    return [Counter(DOMAIN_IDS[i] for i in batch) for batch in sampler]


@pytest.mark.parametrize(("temperature", "per_batch"), [(1.0, (8.0, 1.6, 1.0)), (math.inf, (10 / 3,) * 3)])
def test_every_batch_has_every_domain_at_its_share(temperature, per_batch):
    counts = drawn(DomainSampler(DOMAIN_IDS, 10, temperature=temperature))
    assert len(counts) == 5 and all(sum(c.values()) == 10 and len(c) == 3 for c in counts)
    for domain, expected in enumerate(per_batch):
        # The smallest domain's one row per batch (its share is 0.4) is taken from the largest.
        assert abs(sum(c[domain] for c in counts) - 5 * expected) <= 3 + 1e-9
        assert all(abs(c[domain] - expected) < 2 for c in counts)


def test_shares_follow_the_temperature():
    shares = DomainSampler(DOMAIN_IDS, 10, temperature=2.0).shares
    roots = [math.sqrt(n) for n in (40, 8, 2)]
    assert shares == pytest.approx({d: root / sum(roots) for d, root in enumerate(roots)})


def test_rows_of_a_domain_come_in_turn():
    rows = Counter(i for batch in DomainSampler(DOMAIN_IDS, 10, temperature=math.inf) for i in batch)
    for domain in range(3):
        times = [rows[i] for i, d in enumerate(DOMAIN_IDS) if d == domain]
        assert max(times) - min(times) <= 1


def test_an_epoch_depends_on_seed_and_number_alone():
    first, again, other = (DomainSampler(DOMAIN_IDS, 5, seed=s) for s in (3, 3, 4))
    assert list(first) == list(again) == list(first) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)


def test_impossible_groups_are_refused():
    for ids, size, options, message in [
        ([], 4, {}, "domain_ids is empty"),
        ([0, 1, 2], 2, {}, r"batch_size \(2\) must be at least the number of domains \(3\)"),
        ([0, 1], 4, {}, r"at most the number of rows \(2\)"),
        ([0, 1], 2, {"temperature": 0.0}, r"temperature \(0.0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            DomainSampler(ids, size, **options)


def test_group_sampling_goes_on_where_it_stopped():
    rows = [{"text": f"a{i % 40}", "source": d} for i, d in enumerate(DOMAIN_IDS)]
    data = prepare_dataset(rows, word_tokenizer(), domain_column="source")

    def stream():
        sampler = DomainSampler(data.domain_ids, 10, temperature=2.0)
        return stream_of(DataLoader(data, batch_sampler=sampler, collate_fn=PadCollator(PAD)))

    whole, stopped, resumed = stream(), stream(), stream()
    expected = taken(whole, 12)
    assert taken(stopped, 7) == expected[:7], "two batches into the second epoch"
    resumed.load_state_dict(stopped.state_dict())
    assert taken(resumed, 5) == expected[7:]


# Streams


class Plain(IterableDataset):
    """No position of its own."""

    def __iter__(self):
        return ({"text": f"a{i}"} for i in range(10))


def hub_stream():
    table = datasets.Dataset.from_list([{"text": f"a{i}"} for i in range(10)])
    return table.to_iterable_dataset(num_shards=5)


def shuffled_stream():
    """Holds rows back in a buffer, which its own position leaves out."""
    return hub_stream().shuffle(seed=1, buffer_size=4).map(dict)


@pytest.mark.parametrize("source", [Plain, hub_stream, shuffled_stream])
@pytest.mark.parametrize("position", [2, 3, 5])
def test_streams_go_on_where_they_stopped(source, position):
    def stream():
        return stream_of(StreamLoader(prepare_dataset(source(), word_tokenizer()), 3, PadCollator(PAD)))

    def words(batches, count):
        return [batches.next()["input_ids"][:, 0].tolist() for _ in range(count)]

    expected = words(stream(), 8)
    assert all(len(batch) == 3 for batch in expected), "the tenth row of a pass fills no batch"
    stopped, resumed = stream(), stream()
    assert words(stopped, position) == expected[:position]
    resumed.load_state_dict(stopped.state_dict())
    assert words(resumed, 8 - position) == expected[position:]
    assert [resumed.state_dict()[k] for k in ("epoch", "data")] == [2, words_state(stream, 8)]


def words_state(stream, count):
    whole = stream()
    for _ in range(count):
        whole.next()
    return whole.state_dict()["data"]


def test_streams_number_their_rows_and_refuse_workers(monkeypatch):
    prepared = prepare_dataset(Plain(), word_tokenizer())
    assert [row["example_id"] for row in prepared] == list(range(10))
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        StreamLoader(prepared, 0, PadCollator(PAD))
    monkeypatch.setattr("scalemlo.hf.data.prepared.get_worker_info", object)  # as inside a worker
    with pytest.raises(ValueError, match="num_workers=0"):
        next(iter(prepared))


# Two ranks


def test_two_ranks_share_what_one_would_see():
    rows = [{"text": " ".join(["ask"] * (1 + i % 5) + [f"a{i}"]), "source": i % 3} for i in range(18)]
    data = prepare_dataset(rows, word_tokenizer(), domain_column="source")
    torch.manual_seed(0)
    model = llama("sdpa")
    model.resize_token_embeddings(64, mean_resizing=False)
    model = model.double()

    def losses(rank=0, world_size=1):
        """Loss by example of what this rank gets: grouped and packed, shuffled and packed, streamed and padded."""
        grouped = DataLoader(
            data, batch_sampler=DomainSampler(data.domain_ids, 6), collate_fn=PackingCollator(PAD, max_length=16)
        )
        shuffled = DataLoader(data, 6, shuffle=True, collate_fn=PackingCollator(PAD, max_length=16))
        streamed = StreamLoader(prepare_dataset(Plain(), word_tokenizer()), 4, PadCollator(PAD))
        found = []
        with torch.no_grad():
            for loader in (grouped, shuffled, streamed):
                batches = stream_of(loader)
                for batch in (batches.next() for _ in range(4)):
                    values = example_losses(model, batch)
                    found.append(dict(zip(batch["example_id"].tolist(), values.tolist(), strict=True)))
        refusal = ""
        try:
            StreamLoader(prepare_dataset(Plain(), word_tokenizer()), 4, PackingCollator(PAD))
        except ValueError as error:
            refusal = str(error)
        return found, refusal

    expected, refusal = losses()
    assert not refusal
    (first, refusal), (second, _) = run_ranks(losses, 2)
    assert "train without packing" in refusal
    for a, b, whole in zip(first, second, expected, strict=True):
        assert len(a) == len(b) == len(whole) / 2
        assert a | b == pytest.approx(whole, rel=1e-5)
