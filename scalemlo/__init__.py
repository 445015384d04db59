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
from .loop.check import check
from .loop.gradients import NonFiniteError
from .loop.program import Program
from .loop.trackers import TrackWith
from .memory import Memory
from .ops import constant, mean, sample, weighted_mean
from .planning.planner import plan
from .versions import __version__

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
    "__version__",
    "check",
    "constant",
    "mean",
    "plan",
    "sample",
    "weighted_mean",
]
