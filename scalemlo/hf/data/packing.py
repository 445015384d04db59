"""Several examples in one row, each with its own loss: less padding, the same numbers.

The examples of one batch are packed, not the data set: batch size, order, weights by example, group sampling and the
position in the data stay those of padded batches, and so does, up to rounding, the training. Rows are filled first-fit
decreasing (Johnson 1973), which needs at most 11/9 of the fewest rows possible plus 6/9 (Dosa 2007).

Attention stays within an example because `position_ids` begin anew at each: where there is no attention mask and no
cache, transformers makes its masks block-diagonal at every jump of the positions (`find_packed_sequence_indices`). A
model whose code does not do so mixes examples without a word; :func:`check_packing` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.next_token import IGNORE_INDEX
from .collate import Padding, check_targets, padded, round_up, stacked_ids


class PackingCollator(Padding):
    """Pack a list of E examples into R rows.

    Args:
        pad_token_id: Written behind the last example of a row.
        max_length: Tokens of a row; None takes the length of the batch's longest example.
        pad_to_multiple_of: As in :class:`~scalemlo.hf.data.collate.Padding`.

    Raises:
        ValueError: If ``pad_to_multiple_of`` is below 1.
    """

    def __init__(self, pad_token_id: int, *, max_length: int | None = None, pad_to_multiple_of: int = 1):
        super().__init__(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self.max_length = max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: E examples with ``input_ids``, ``labels``, ``example_id`` and, if they have it, ``domain_id``.

        Returns:
            int64 tensors ``input_ids``, ``position_ids`` (from 0 for each example and for the padding), ``labels``
            (none on an example's first token), ``example_index`` (which of the E examples a token is of; 0 for padding)
            ``[R, T]``, and ``example_id`` ``[E]``. The examples are in the order of the rows, not in that of the list.

        Raises:
            ValueError: If an example is longer than ``max_length`` or has no label to predict.
        """
        check_targets(rows, "labels")
        lengths = [len(row["input_ids"]) for row in rows]
        capacity = max(lengths) if self.max_length is None else self.max_length
        if max(lengths) > capacity:
            raise ValueError(
                f"an example of {max(lengths)} tokens does not fit into a packed row of max_length ({capacity}); raise "
                "it, or prepare the data with the same max_length"
            )
        bins = first_fit_decreasing(lengths, capacity)
        length = round_up(max(sum(lengths[i] for i in one) for one in bins), self.pad_to_multiple_of)
        # Numbered row after row: where every example has a row of its own, example i is row i, as in a padded batch.
        number = {i: n for n, i in enumerate(i for one in bins for i in one)}

        def laid_out(values: Callable[[int], Sequence[int]], fill: int) -> Tensor:
            return padded([[x for i in one for x in values(i)] for one in bins], length, fill)

        batch = {
            "input_ids": laid_out(lambda i: rows[i]["input_ids"], self.pad_token_id),
            "labels": laid_out(lambda i: [IGNORE_INDEX, *rows[i]["labels"][1:]], IGNORE_INDEX),
            "position_ids": laid_out(lambda i: range(lengths[i]), 0),
            "example_index": laid_out(lambda i: [number[i]] * lengths[i], 0),
        }
        return {**batch, **stacked_ids([rows[i] for i in number])}


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign items to bins: the longest first, each to the first bin that it fits into.

    Args:
        lengths: Of the items, none above the capacity.
        capacity: Of a bin.

    Returns:
        Indices of the items of each bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


@torch.no_grad()
def check_packing(model: nn.Module, *, vocab_size: int, tolerance: float = 1e-2) -> None:
    """Run two short sequences packed and apart, and compare their logits.

    Call it once before training, on a model that is not sharded yet; it is run in evaluation mode.

    Args:
        model: Called as in :func:`~scalemlo.hf.losses.next_token.token_losses`.
        vocab_size: Token ids are drawn below it.
        tolerance: Of the logits, relative to the largest; bf16 rounds to 4e-3.

    Raises:
        ValueError: If they differ: attention (or a recurrent state) reaches from one sequence into the next.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(iter(model.parameters())).device
    ids = torch.randint(0, vocab_size, (2, 5), generator=generator).to(device)
    positions = torch.arange(5, device=device).expand(2, 5)
    was_training = model.training
    model.eval()
    apart = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    packed = model(input_ids=ids.view(1, 10), position_ids=positions.reshape(1, 10), use_cache=False).logits
    model.train(was_training)
    error = float((packed.view_as(apart) - apart).abs().max() / apart.abs().max())
    if not error <= tolerance:
        raise ValueError(
            f"packing: the logits of {type(model).__name__} change by {error:.1e} of their size when two sequences "
            "share a row, so that examples would see each other. Its code does not keep packed sequences apart by "
            "position_ids: train it without packing."
        )
