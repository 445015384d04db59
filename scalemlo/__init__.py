"""scalemlo: multilevel optimization of models too large for one device."""

from .checkpoint import Checkpointing
from .engines import DDP, FSDP, DeepSpeed, Single
from .graph import LevelGraph, Lower, Upper
from .hypergradients import (
    SAMA,
    SOBA,
    ConjugateGradient,
    ForwardGradient,
    Hypergradient,
    Identity,
    Neumann,
    Nystrom,
    PBGDFree,
    Penalty,
    Reinforce,
    Unrolled,
    ZerothOrder,
)
from .level import Level
from .ops import constant, mean, sample, weighted_mean
from .program import NonFiniteError, Program
from .scheduler import Memory
from .scheduler.plan import plan
from .second_order.errors import DerivativeError
from .shards import Shards
from .trackers import TrackWith
from .tracking import History

__version__ = "0.1.0"

__all__ = [
    "Checkpointing",
    "ConjugateGradient",
    "DDP",
    "DeepSpeed",
    "DerivativeError",
    "FSDP",
    "ForwardGradient",
    "History",
    "Hypergradient",
    "Identity",
    "Level",
    "LevelGraph",
    "Lower",
    "Memory",
    "Neumann",
    "NonFiniteError",
    "Nystrom",
    "PBGDFree",
    "Penalty",
    "Program",
    "Reinforce",
    "SAMA",
    "SOBA",
    "Shards",
    "Single",
    "TrackWith",
    "Unrolled",
    "Upper",
    "ZerothOrder",
    "constant",
    "mean",
    "plan",
    "sample",
    "weighted_mean",
]
