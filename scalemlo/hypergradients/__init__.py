"""Estimators of the hypergradient."""

from importlib import import_module
from pkgutil import iter_modules

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
from .registry import ESTIMATORS, estimator, estimator_of
from .reinforce import Reinforce
from .sama import SAMA
from .soba import SOBA
from .unrolled import Unrolled
from .zeroth_order import ZerothOrder

for _module in iter_modules(__path__):  # a new file registers its estimators without an entry here
    import_module(f"{__name__}.{_module.name}")

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
    "estimator",
    "estimator_of",
]
