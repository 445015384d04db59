"""What the solvers of ``H s = v`` share; they know a matrix-vector product and vectors, not levels or engines."""

from collections.abc import Callable

import torch

from ..distributed.shards import Shards

Matvec = Callable[[Shards], Shards]
"""``v -> H v``, a new vector laid out like v. Collective where v is sharded."""


def rounding(v: Shards) -> float:
    """Relative rounding error of a vector's coarsest dtype: no residual can be told from zero below it."""
    return max(torch.finfo(t.dtype).eps for t in v.values())
