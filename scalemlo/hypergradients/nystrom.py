"""The inverse of a low-rank sketch of the Hessian, kept over several solves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards
from .base import CurvatureHypergradient, LowerProblem, Result, Status
from .fields import require_count, require_number
from .random_directions import gaussian
from .registry import estimator
from .solver import Matvec, rounding


@dataclass(frozen=True)
class Sketch:
    """``H_k = Q Z diag(h) Z^T Q^T``, the Nystrom approximation of H from its products with k test vectors.

    Args:
        basis: Q, orthonormal vectors, m <= k of them.
        eigenvectors: Z, ``[m, m]``, orthogonal, fp64 on the CPU, equal on every rank.
        eigenvalues: h, ``[m]``.
        is_indefinite: Whether H showed negative curvature on the span of the test vectors.
    """

    basis: list[Shards]
    eigenvectors: Tensor
    eigenvalues: Tensor
    is_indefinite: bool

    @classmethod
    def of(cls, matvec: Matvec, draw: Callable[[int], Shards], rank: int) -> "Sketch | None":
        """``H_k = Y W^+ Y^T`` with ``Y = H X`` and ``W = X^T Y``, for test vectors X.

        Y is orthonormalised as it comes, ``Y = Q R``, and W follows from ``X^T Q`` and R, so that k + 2 vectors are
        held and no test vector is needed twice. Everything else is k x k, in fp64.

        Args:
            matvec: ``v -> H v``.
            draw: The i-th test vector.
            rank: k, the number of products.

        Returns:
            The sketch. Eigenvalues of W that rounding cannot tell from zero are left out of the pseudo-inverse. None
            where a product was not finite.
        """
        basis: list[Shards] = []
        r = torch.zeros(rank, rank, dtype=torch.float64)  # rows: basis vectors
        w = torch.zeros(rank, rank, dtype=torch.float64)  # lower triangle
        eps = 0.0
        for i in range(rank):
            x = draw(i)
            y = matvec(x)
            eps = rounding(y)
            w[i, i] = float(x.dot(y))
            if basis:
                w[i, :i] = _products(basis, x) @ r[: len(basis), :i]
            _append_orthogonal(basis, y, r[:, i], eps)
        r = r[: len(basis)]
        if not (r.isfinite().all() and w.isfinite().all()):
            return None
        w = torch.tril(w) + torch.tril(w, -1).T
        values, vectors = torch.linalg.eigh(w)
        floor = rank * eps * values.abs().max()
        scale = torch.where(values.abs() > floor, values.abs().rsqrt(), 0.0)
        root = r @ (vectors * scale)  # H_k = Q root diag(sign) root^T Q^T
        inner = (root * values.sign()) @ root.T
        h, z = torch.linalg.eigh(inner)
        return cls(basis, z, h, bool((values < -floor).any()))

    def solve(self, v: Shards, damping: float) -> Shards:
        """``(|H_k| + damping I)^-1 v`` in the eigenbasis; Woodbury's usual form divides by damping squared.

        Args:
            v: Right-hand side.
            damping: Greater than zero.

        Returns:
            The solution, a new vector.
        """
        s = v * (1.0 / damping)
        if self.basis:
            change = 1.0 / (self.eigenvalues.abs() + damping) - 1.0 / damping
            coefficients = self.eigenvectors @ (change * (self.eigenvectors.T @ _products(self.basis, v)))
            for q, coefficient in zip(self.basis, coefficients.tolist(), strict=True):
                s.add_(q, alpha=coefficient)
        return s

    def put_into(self, memory: dict[str, Any]) -> None:
        """Keep it as tensors, vectors and numbers, which a checkpoint can hold."""
        memory |= {f"basis_{i}": q for i, q in enumerate(self.basis)}
        memory |= {"eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues}
        memory["is_indefinite"] = self.is_indefinite

    @classmethod
    def from_memory(cls, memory: dict[str, Any]) -> "Sketch":
        """The inverse of :meth:`put_into`."""
        basis = [memory[f"basis_{i}"] for i in range(len(memory["eigenvalues"]))]
        return cls(basis, memory["eigenvectors"], memory["eigenvalues"], memory["is_indefinite"])


def _products(basis: list[Shards], v: Shards) -> Tensor:
    return torch.tensor([float(q.dot(v)) for q in basis], dtype=torch.float64)


def _append_orthogonal(basis: list[Shards], y: Shards, column: Tensor, eps: float) -> None:
    """Gram-Schmidt, twice: once leaves an error of the size of what cancels. y is changed; a dependent y is dropped."""
    norm = float(y.norm())
    for _ in range(2):
        for i, q in enumerate(basis):
            part = float(q.dot(y))
            y.add_(q, alpha=-part)
            column[i] += part
    left = float(y.norm())
    if left > 10 * eps * norm:
        column[len(basis)] = left
        basis.append(y.mul_(1.0 / left))


@estimator(
    "nystrom", citation="Hataya and Yamada 2023, Nyström Method for Accurate and Scalable Implicit Differentiation"
)
@dataclass(frozen=True, kw_only=True)
class Nystrom(CurvatureHypergradient):
    """``s(v) = (H_k + damping I)^-1 v``, with H_k the Nystrom approximation of rank k of the Hessian.

    Exact for the damped system where H has at most k nonzero eigenvalues. Its error does not build up over iterations,
    and there is no step size; directions outside the sketch are divided by ``damping``. A sketch costs k Hessian-vector
    products and serves ``refresh_every`` solves, at no product each; k vectors are kept, for each level that asks.

    On an indefinite sketch the absolute values of its eigenvalues are used, so that s stays finite and directions of
    strong curvature of either sign stay short (as in Dauphin et al. 2014), and the status says so.

    Reference: Hataya and Yamada 2023, "Nystrom Method for Accurate and Scalable Implicit Differentiation", with
    Gaussian test vectors in the place of random columns; the solve in the eigenbasis is that of Frangella et al. 2023,
    "Randomized Nystrom Preconditioning".

    Args:
        mixed: See :class:`ImplicitHypergradient`.
        products: See :class:`CurvatureHypergradient`.
        rank: k.
        damping: Added to the diagonal of H_k.
        refresh_every: Solves per sketch; 1 makes a new one for every solve.
        seed: Of the test vectors; every new sketch draws others.

    Raises:
        ValueError: If a field is out of range.
    """

    rank: int = 10
    damping: float = 0.01
    refresh_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "rank")
        require_number(self, "damping", positive=True)
        require_count(self, "refresh_every")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**31:
            raise ValueError(f"Nystrom: seed={self.seed!r} must be an integer from 0 to 2^31 - 1.")

    def solve(self, v: Shards, problem: LowerProblem) -> Result:
        """Return the solution with the sketch in hand, or with a new one.

        Args:
            v: Gradient of the upper loss by the lower weights.
            problem: The lower level; its memory holds the sketch, and how many solves there were.

        Returns:
            The estimate. Its residual is not known without a further product.
        """
        num_solves = problem.memory.get("num_solves", 0)
        num_products = 0
        if num_solves % self.refresh_every == 0:
            problem.memory.clear()  # the old sketch's vectors go before the new one's come
            number = num_solves // self.refresh_every
            with problem.hessian(self.products) as hessian:
                sketch = Sketch.of(hessian, lambda i: gaussian(problem.block, self._seed_of(number, i)), self.rank)
                num_products = hessian.num_products
            if sketch is None:  # this solve's NaN, which the program raises or skips, must not become the next one's
                problem.memory["num_solves"] = num_solves
                return Result(v * math.nan, Status.DIVERGED, num_products, num_products)
            sketch.put_into(problem.memory)
        else:
            sketch = Sketch.from_memory(problem.memory)
        problem.memory["num_solves"] = num_solves + 1
        status = Status.INDEFINITE if sketch.is_indefinite else Status.DONE
        return Result(sketch.solve(v, self.damping), status, num_products, num_products)

    def _seed_of(self, number: int, i: int) -> int:
        """Of the i-th test vector of a sketch: neighbours must not share their random numbers."""
        return ((self.seed * 1_000_003 + number) * 1_000_003 + i) % 2**63
