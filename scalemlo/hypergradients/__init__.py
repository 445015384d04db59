"""Estimators of the hypergradient."""

from .base import (
    CurvatureHypergradient,
    Hypergradient,
    ImplicitHypergradient,
    LowerProblem,
    Result,
    Status,
    UnrollingHypergradient,
)
from .conjugate_gradient import ConjugateGradient
from .forward_gradient import ForwardGradient
from .identity import Identity
from .neumann import Neumann
from .nystrom import Nystrom
from .penalty import Penalty
from .penalty_free import PBGDFree
from .reinforce import Reinforce
from .sama import SAMA
from .soba import SOBA
from .unrolled import Unrolled
from .zeroth_order import ZerothOrder

ESTIMATORS: dict[str, type[Hypergradient]] = {
    "identity": Identity,
    "sama": SAMA,
    "neumann": Neumann,
    "conjugate_gradient": ConjugateGradient,
    "nystrom": Nystrom,
    "soba": SOBA,
    "penalty": Penalty,
    "pbgd_free": PBGDFree,
    "unrolled": Unrolled,
    "forward_gradient": ForwardGradient,
    "zeroth_order": ZerothOrder,
    "reinforce": Reinforce,
}
"""Estimator by the name configurations use."""

__all__ = [
    "ESTIMATORS",
    "ConjugateGradient",
    "CurvatureHypergradient",
    "ForwardGradient",
    "Hypergradient",
    "Identity",
    "ImplicitHypergradient",
    "LowerProblem",
    "Neumann",
    "Nystrom",
    "PBGDFree",
    "Penalty",
    "Reinforce",
    "Result",
    "SAMA",
    "SOBA",
    "Status",
    "Unrolled",
    "UnrollingHypergradient",
    "ZerothOrder",
]
