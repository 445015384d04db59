"""Linear systems with a known spectrum, over vectors of several parameters, and the bilevel problem made of one."""

from functools import partial

import torch
from torch import Tensor, nn

import scalemlo as mlo

SHAPES = {"a": (3, 2), "b": (5,), "c": (1,)}
SIZE = 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues and random eigenvectors, ``[12, 12]``."""
    q = torch.linalg.qr(normal(SIZE, SIZE, seed=seed)).Q
    matrix = q @ eigenvalues.double().diag() @ q.T
    return (matrix + matrix.T) / 2


def to_shards(flat: Tensor) -> mlo.Shards:
    parts = flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return mlo.Shards({n: t.clone().view(shape) for (n, shape), t in zip(SHAPES.items(), parts, strict=True)})


def to_flat(v: mlo.Shards) -> Tensor:
    return torch.cat([t.reshape(-1) for t in v.values()])


class Dense:
    """``v -> H v``, counting."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.num_products = matrix, 0

    def __call__(self, v: mlo.Shards) -> mlo.Shards:
        self.num_products += 1
        return to_shards(self.matrix @ to_flat(v))

    def residual(self, s: mlo.Shards, v: mlo.Shards, damping: float = 0.0) -> float:
        """``|v - (H + damping I) s| / |v|``, without any solver."""
        b = to_flat(v)
        return float((b - self.matrix @ to_flat(s) - damping * to_flat(s)).norm() / b.norm())


# ---- a bilevel problem -----------------------------------------------------------------------------------------------
class Parts(nn.Module):
    """The parameters of SHAPES, seen as one vector."""

    def __init__(self, flat: Tensor):
        super().__init__()
        for name, t in to_shards(flat).items():
            setattr(self, name, nn.Parameter(t))

    def forward(self) -> Tensor:
        return torch.cat([self.a.reshape(-1), self.b, self.c])


class Response(nn.Module):
    def __init__(self, x: Tensor):
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        return self.x


class Bilevel:
    """``L = w^T H w / 2 - w^T (A x + c)`` and ``F = |w - t|^2 / 2 + |x|^2 / 2``, at any w.

    The mixed partial of L with s is ``-A^T s``, so the hypergradient is ``x + A^T H^-1 (w - t)``.
    """

    def __init__(self, eigenvalues: Tensor, lower_optimizer=None):
        self.h, self.a = symmetric(eigenvalues, seed=1), normal(SIZE, 4, seed=2)
        self.c, self.t, self.w, self.x = (normal(n, seed=3 + i) for i, n in enumerate((SIZE, SIZE, SIZE, 4)))
        self.lower_optimizer = lower_optimizer or partial(torch.optim.SGD, lr=0.1)

    def program(self, estimator: mlo.Hypergradient, spec: mlo.engines.EngineSpec) -> mlo.Program:
        problem = self

        class Lower(mlo.Level):
            def loss(self, upper):
                w = self.module()
                return w @ (problem.h @ w) / 2 - w @ (problem.a @ upper() + problem.c)

        class Upper(mlo.Level):
            def loss(self, lower):
                return (lower() - problem.t).square().sum() / 2 + self.module().square().sum() / 2

        upper = Upper("upper", Response(self.x), optimizer=partial(torch.optim.SGD, lr=1e-3))
        lower = Lower("lower", Parts(self.w), optimizer=self.lower_optimizer, hypergradient=estimator)
        return mlo.Program([upper, lower], engine=spec)

    def expected(self, damping: float = 0.0) -> Tensor:
        damped = self.h + damping * torch.eye(SIZE, dtype=torch.float64)
        return self.x + self.a.T @ torch.linalg.solve(damped, self.w - self.t)

    def measured(self, estimator: mlo.Hypergradient, spec: mlo.engines.EngineSpec) -> Tensor:
        program = self.program(estimator, spec)
        return program.trainers["upper"].engine.gather(dict(program.gradients()["upper"]))["x"]
