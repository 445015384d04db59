"""Batches in which every domain is seen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


class DomainSampler:
    """A batch sampler for ``DataLoader(batch_sampler=...)`` that draws from every domain in every batch.

    Domain d with n_d rows has the share ``p_d = n_d^(1/tau) / sum_k n_k^(1/tau)`` (Arivazhagan et al. 2019,
    arXiv:1907.05019, section 4.1): proportional for tau = 1, equal for tau = ``math.inf``. Each batch has at least one
    row of each domain; over batches the numbers of rows follow the shares, as far as that allows. Within a domain rows
    are shuffled and taken in turn, begun anew when they are used up, so that in one epoch of ``N // batch_size``
    batches rows of small domains may come several times and some of large ones not at all.

    What an epoch holds depends on seed and epoch alone. Batches are global, as all of scalemlo's: W ranks take 1/W of
    each, and the position in the data is found again on any number of ranks.

    Args:
        domain_ids: Domain of every row, ``PreparedDataset.domain_ids``.
        batch_size: Rows per batch, over all ranks.
        temperature: tau.
        seed: Of the shuffling.

    Raises:
        ValueError: If there are no domains, more than a batch has rows, or a batch is larger than the data; or the
            temperature is not positive.
    """

    def __init__(self, domain_ids: Sequence[int], batch_size: int, *, temperature: float = 1.0, seed: int = 0):
        self._members: dict[int, list[int]] = {}
        for index, domain in enumerate(domain_ids):
            self._members.setdefault(domain, []).append(index)
        if not self._members:
            raise ValueError("domain_ids is empty; prepare the data set with domain_column=...")
        if batch_size < len(self._members):
            raise ValueError(
                f"batch_size ({batch_size}) must be at least the number of domains ({len(self._members)}), so that "
                "each is seen in every batch; raise it, or merge domains"
            )
        if batch_size > len(domain_ids):
            raise ValueError(f"batch_size ({batch_size}) must be at most the number of rows ({len(domain_ids)})")
        if not temperature > 0:
            raise ValueError(f"temperature ({temperature}) must be positive; 1 is proportional, math.inf is balanced")
        self.batch_size, self._seed, self._epoch = batch_size, seed, 0
        self._num_batches = len(domain_ids) // batch_size
        sizes = {domain: len(members) ** (1 / temperature) for domain, members in sorted(self._members.items())}
        self.shares = {domain: size / sum(sizes.values()) for domain, size in sizes.items()}

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next pass draws."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        turns = {domain: self._in_turn(domain) for domain in self.shares}
        order = random.Random(f"{self._seed}/{self._epoch}/order")
        owed = dict.fromkeys(self.shares, 0.0)  # rows a domain should have had, minus those it has had
        for _ in range(self._num_batches):
            counts = dict.fromkeys(self.shares, 1)
            for domain, share in self.shares.items():
                owed[domain] += self.batch_size * share - 1
            for _ in range(self.batch_size - len(counts)):
                domain = max(owed, key=lambda d: owed[d])
                counts[domain] += 1
                owed[domain] -= 1
            batch = [next(turns[domain]) for domain, count in counts.items() for _ in range(count)]
            order.shuffle(batch)  # else a rank's part would be one domain's
            yield batch

    def _in_turn(self, domain: int) -> Iterator[int]:
        draws = random.Random(f"{self._seed}/{self._epoch}/{domain}")
        while True:
            yield from draws.sample(self._members[domain], len(self._members[domain]))
