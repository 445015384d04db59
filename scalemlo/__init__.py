"""scalemlo: multilevel optimization of models too large for one device."""

from .autodiff.errors import DerivativeError
from .checkpoint import Checkpointing
from .distributed.shards import Shards
from .engines import DDP, FSDP, DeepSpeed, Single
from .graph import LevelGraph, Lower, Upper
from .history import History
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
from .loop.program import NonFiniteError, Program
from .loop.trackers import TrackWith
from .memory import Memory
from .ops import constant, mean, sample, weighted_mean
from .planning.plan import plan

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
