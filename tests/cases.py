"""One row per estimator: every engine, precision and world size goes through all of them."""

from dataclasses import dataclass

import scalemlo as mlo


@dataclass(frozen=True)
class Case:
    """An estimator with settings that make its answer a smooth function of the problem.

    Args:
        estimator: The estimator.
        unroll_steps: Of the lower level.
        rounding: Factor by which its answer is worse than a gradient's: it differences losses, say.
        is_bf16_ready: Whether its answer survives a computation in bf16.
    """

    estimator: mlo.Hypergradient
    unroll_steps: int = 1
    rounding: float = 1.0
    is_bf16_ready: bool = True


CASES: dict[str, Case] = {
    "identity": Case(mlo.Identity()),
    "identity, forward": Case(mlo.Identity(mixed="forward")),
    "sama": Case(mlo.SAMA()),
    "neumann": Case(mlo.Neumann(num_terms=3, step_size=0.1)),
    "neumann, remat": Case(mlo.Neumann(num_terms=3, step_size=0.1, products="remat")),
    "neumann, retain": Case(mlo.Neumann(num_terms=3, step_size=0.1, products="retain")),
    "neumann, optimizer": Case(mlo.Neumann(num_terms=3, preconditioner="optimizer")),
    "conjugate gradient": Case(mlo.ConjugateGradient(max_steps=3, tolerance=None, damping=1.0)),
    "nystrom": Case(mlo.Nystrom(rank=3, damping=1.0)),
    "soba": Case(mlo.SOBA(step_size=0.1, num_steps=2)),
    "penalty": Case(mlo.Penalty(learning_rate=0.1, num_steps=2), rounding=10.0, is_bf16_ready=False),
    "unrolled": Case(mlo.Unrolled(), unroll_steps=2),
    "truncated": Case(mlo.Unrolled(num_steps=1), unroll_steps=2),
    "forward gradient": Case(mlo.ForwardGradient(), unroll_steps=2),
    "zeroth order": Case(mlo.ZerothOrder(radius=0.1), unroll_steps=2, rounding=1e3, is_bf16_ready=False),
}
"""Not here: Reinforce, whose draws depend on the number of ranks, and PBGDFree, which adds nothing: see their tests."""
