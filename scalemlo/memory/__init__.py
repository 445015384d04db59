"""Which states a phase of the outer iteration needs, what it costs, and what is on the device meanwhile."""

from .budget import Memory
from .phases import Phase, StateName
from .scheduler import Scheduler, scheduler_of

__all__ = ["Memory", "Phase", "Scheduler", "StateName", "scheduler_of"]
