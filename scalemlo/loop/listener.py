"""What a program tells whoever listens, step by step: the trainers' callbacks hear it."""


class Listener:
    """Hears of each tick and each level's step; put one into ``program.listener``.

    A tick is one step of the levels at the bottom; see :class:`scalemlo.Program`. Everything is called on every rank,
    with values that are equal on all ranks. Nothing may be changed: gradients of one tick are taken at one point.
    """

    def on_tick_begin(self) -> None:
        """Before the batches of a tick are taken."""

    def on_micro_batch(self, level: str) -> None:
        """After a micro-batch of a level's gradient, but for the last of a step."""

    def on_level_gradient(self, level: str, loss: float, norm: float, is_hypergradient: bool) -> None:
        """When a level's gradient is complete, before it steps.

        Args:
            level: Its name.
            loss: Its loss on the batches of this step.
            norm: Of the gradient, before clipping.
            is_hypergradient: Whether the level depends on the best response of one below it.
        """

    def on_level_step(self, level: str, loss: float) -> None:
        """After a level's step.

        Args:
            level: Its name.
            loss: Its loss before the step.
        """

    def on_tick_end(self) -> None:
        """After all steps of a tick."""
