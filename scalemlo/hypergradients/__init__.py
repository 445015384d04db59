"""Estimators of the hypergradient."""

from .base import Hypergradient, LowerProblem, Result, Status
from .identity import Identity
from .sama import SAMA

ESTIMATORS: dict[str, type[Hypergradient]] = {"identity": Identity, "sama": SAMA}
"""Estimator by the name configurations use."""

__all__ = ["ESTIMATORS", "Hypergradient", "Identity", "LowerProblem", "Result", "SAMA", "Status"]
