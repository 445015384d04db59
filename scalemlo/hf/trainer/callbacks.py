"""transformers' callbacks on a multilevel program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ...loop.listener import Listener

if TYPE_CHECKING:
    from .trainer import MLOTrainer


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


class Bridge(Listener):
    """Turns what a program tells into transformers' events.

    ``should_log``, ``should_evaluate`` and ``should_save`` of a step are kept until the outer iteration ends: between
    its steps the levels are not at one point.

    Args:
        trainer: Whose state, control and callbacks.
    """

    def __init__(self, trainer: MLOTrainer):
        self._trainer = trainer
        self.due: set[str] = set()

    def _call_if_heard(self, event: str, **kwargs: Any) -> None:
        t = self._trainer
        t.control = t.callback_handler.call_if_heard(event, t.args, t.state, t.control, **kwargs)

    def on_tick_begin(self) -> None:
        """See :class:`Listener`."""
        self._trainer._event("on_step_begin")

    def on_micro_batch(self, level: str) -> None:
        """See :class:`Listener`."""
        if level == self._trainer.model_level:
            self._trainer._event("on_substep_end")

    def on_level_gradient(self, level: str, loss: float, norm: float, is_hypergradient: bool) -> None:
        """See :class:`Listener`."""
        t = self._trainer
        t.meter.add(level, loss, norm, float(t.program.trainers[level].optimizer.param_groups[0]["lr"]))
        if is_hypergradient:
            self._call_if_heard("on_hypergradient", level=level, norm=norm)
        if level == t.model_level:
            t.meter.count(loss)
            self._trainer._event("on_pre_optimizer_step")

    def on_level_step(self, level: str, loss: float) -> None:
        """See :class:`Listener`."""
        if level == self._trainer.model_level:
            self._trainer._event("on_optimizer_step")
        self._call_if_heard("on_level_step_end", level=level, loss=loss)

    def on_tick_end(self) -> None:
        """See :class:`Listener`."""
        t = self._trainer
        t.state.global_step += 1
        t.state.epoch = t.state.global_step / t.steps_per_epoch
        self._trainer._event("on_step_end")
        self.note_due()

    def note_due(self) -> None:
        """Keep what callbacks asked for.

        Raises:
            ValueError: If one asked for the end of an epoch.
        """
        control = self._trainer.control
        if control.should_epoch_stop:
            raise ValueError("a callback set should_epoch_stop, which is not supported: use should_training_stop.")
        self.due |= {name for name in ("log", "evaluate", "save") if getattr(control, f"should_{name}")}
