"""Exact products of sharded levels: Hessian-vector products, mixed partials, ghost products, trajectories."""
