"""transformers' callbacks on a multilevel program."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class MLOCallback(TrainerCallback):
    """transformers' ``TrainerCallback`` with the events of levels above the fine-tuned model."""

    def on_level_step_end(self, args, state, control, *, level: str, loss: float, **kwargs):
        """After a step of a level.

        Args:
            args: Of the trainer.
            state: Of the trainer.
            control: What to do next.
            level: Name of the level.
            loss: Its loss before the step.
            **kwargs: As in every event.
        """

    def on_hypergradient(self, args, state, control, *, level: str, norm: float, **kwargs):
        """When a level's hypergradient is complete, before its step.

        Args:
            args: Of the trainer.
            state: Of the trainer.
            control: What to do next.
            level: Name of the level.
            norm: Norm of the hypergradient, before clipping.
            **kwargs: As in every event.
        """


class MLOCallbackHandler(CallbackHandler):
    """Calls callbacks in order; the events of levels only where a callback has them."""

    def call_if_heard(self, event: str, args, state, control, **kwargs):
        """Call an event that plain ``TrainerCallback`` s do not have.

        Args:
            event: Its name.
            args: Of the trainer.
            state: Of the trainer.
            control: What to do next.
            **kwargs: Of the event.

        Returns:
            What to do next.
        """
        everyone = self.callbacks
        self.callbacks = [callback for callback in everyone if hasattr(callback, event)]
        try:
            return self.call_event(event, args, state, control, **kwargs)
        finally:
            self.callbacks = everyone


class Meter:
    """Sums of what is logged, per level, since the last log; saved with the program, so that a resumed run logs alike.

    Args:
        stored: Where the sums live: a dict in ``Program.extra_state``.
    """

    def __init__(self, stored: dict[str, Any]):
        self.stored = stored
        for key, value in {"losses": {}, "norms": {}, "rates": {}, "total": 0.0, "num_total": 0}.items():
            stored.setdefault(key, value)

    def add(self, level: str, loss: float, norm: float, rate: float) -> None:
        """Note one gradient of a level."""
        total, count = self.stored["losses"].get(level, (0.0, 0))
        self.stored["losses"][level] = [total + loss, count + 1]
        self.stored["norms"][level], self.stored["rates"][level] = norm, rate

    def count(self, loss: float) -> None:
        """Add to the mean over the whole run."""
        self.stored["total"] += loss
        self.stored["num_total"] += 1

    @property
    def mean_loss(self) -> float:
        """Of the fine-tuned level over the whole run."""
        return self.stored["total"] / max(1, self.stored["num_total"])

    def take(self, level: str) -> dict[str, float]:
        """Mean loss since the last log, and gradient norm and learning rate of the last step; empty without a step."""
        if level not in self.stored["losses"]:
            return {}
        total, count = self.stored["losses"].pop(level)
        return {
            "loss": total / count,
            "grad_norm": self.stored["norms"][level],
            "learning_rate": self.stored["rates"][level],
        }
