"""Rows of one data set that also stand in another, which would let an upper level see its own answers below."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from .collate import ID_COLUMNS
from .prepared import PreparedDataset

logger = logging.getLogger(__name__)


def overlapping_rows(lower: Iterable[Mapping[str, Any]], upper: Iterable[Mapping[str, Any]]) -> list[int]:
    """Find rows with the same content: the same tokens and labels, whatever their ids.

    Args:
        lower: Rows trained on below, as prepared.
        upper: Rows of the level above, prepared with the same options.

    Returns:
        Positions in ``upper`` of the rows that also stand in ``lower``.
    """
    known = {_digest(row) for row in lower}
    return [position for position, row in enumerate(upper) if _digest(row) in known]


def warn_of_overlap(train: PreparedDataset, meta: PreparedDataset) -> int:
    """Count the rows of the upper level's data that the lower level trains on, and warn if there are any.

    With such rows the upper loss falls by remembering them: weights go to the rows that both have, not to good ones.

    Args:
        train: The lower level's data.
        meta: The upper level's, prepared with the same options.

    Returns:
        Their number.
    """
    found = overlapping_rows(train, meta)
    if found:
        logger.warning(
            "%d of %d rows of %s also stand in %s (the first at position %d): the upper level rewards remembering "
            "them. Keep them out of one of the two.",
            len(found),
            len(meta),
            meta.name,
            train.name,
            found[0],
        )
    return len(found)


def _digest(row: Mapping[str, Any]) -> bytes:
    content = {column: value for column, value in row.items() if column not in ID_COLUMNS}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
