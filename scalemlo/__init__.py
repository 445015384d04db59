"""scalemlo: multilevel optimization of models too large for one device."""

from .engines import DDP, FSDP, Single
from .graph import LevelGraph, Lower, Upper
from .hypergradients import SAMA, Hypergradient, Identity
from .level import Level
from .ops import constant, mean, weighted_mean
from .program import NonFiniteError, Program
from .second_order.errors import DerivativeError
from .shards import Shards
from .tracking import History

__version__ = "0.1.0"

__all__ = [
    "DDP",
    "DerivativeError",
    "FSDP",
    "History",
    "Hypergradient",
    "Identity",
    "Level",
    "LevelGraph",
    "Lower",
    "NonFiniteError",
    "Program",
    "SAMA",
    "Shards",
    "Single",
    "Upper",
    "constant",
    "mean",
    "weighted_mean",
]
