"""Checkpoints: written whole or not at all, read on any number of ranks and by any engine.

A checkpoint is a folder ``step-000123``::

    __<rank>_0.distcp, .metadata   vectors, by torch.distributed.checkpoint: each rank writes the entries it holds
    shared.pt                      values that every rank has
    rank-00000.pt, ...             values of one rank: random states, positions in the data, buffers
    history.json, extra.json       the record of the run, and what callers put into ``Program.extra_state``
    manifest.json                  what program it is of, size and checksum of every file; written last

Every vector (weights, moments, an estimator's directions) is stored as the flattened tensor of the parameter's true
size, in pieces. Whole parameters, row shards and ZeRO's flat shards are all pieces of it, so that loading on other
engines or world sizes is a matter of intersecting intervals.

A checkpoint is written as ``step-000123.tmp``, flushed to the disk, and renamed. Nothing that is read can run code: the
``.pt`` files are read with ``weights_only=True``, and DCP's metadata, a pickle, by a reader that knows its classes
alone.
"""

from .folders import complete_checkpoints, find_checkpoint
from .loading import load_checkpoint
from .saving import Checkpointing, save_checkpoint, saving

__all__ = [
    "Checkpointing",
    "complete_checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "saving",
]
