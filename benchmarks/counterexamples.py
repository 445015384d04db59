"""Cases in which a hypergradient is not what it seems, and what `mlo.check(program)` says of them.

    python benchmarks/counterexamples.py [--only NAME ...]

`many_steps`: weights of 200 digits, of which 40 % have a wrong label, learned through a classifier that takes 40 steps
of gradient descent between two steps of the weights: estimators of one step differ from the derivative through all.
`middle`: a level between two others whose loss is curved in the level below it; the system that is solved for it has
partial second derivatives, and no check of this hop exists. docs/counterexamples.md has what comes out.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scalemlo as mlo
from scalemlo.loop.check import CheckReport
from scalemlo.recipes.data.images import load_images
from scalemlo.reporting.tables import markdown_table

WRONG_SHARE = 0.4


class Values(nn.Module):
    """Parameters that a loss reads whole.

    Args:
        value: What they are at first.
    """

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        """All of them."""
        return self.value


class Regression(nn.Linear):
    """Softmax regression; without inputs half its squared norm."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Logits ``[B, 10]`` of ``[B, 64]``, or the number."""
        return super().forward(x) if x is not None else (self.weight.square().sum() + self.bias.square().sum()) / 2


class Weigh(mlo.Level):
    """The classifier should be right on clean digits."""

    def loss(self, batch, classifier):
        """Mean loss."""
        return mlo.mean(F.cross_entropy(classifier(batch[0]), batch[1], reduction="none"))


class Classify(mlo.Level):
    """Softmax regression on weighted digits, ridge 1e-3."""

    def loss(self, batch, weights):
        """Weighted mean of the losses."""
        losses = F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")
        return mlo.weighted_mean(losses, weights().sigmoid(), normalize=False) + 1e-3 * self.module()


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """200 training digits with labels of which some are wrong, and 100 clean ones."""
    images, generator = load_images("digits"), torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images.train_y), generator=generator)[:300]
    x, y = images.train_x[rows].flatten(1).double(), images.train_y[rows]
    is_wrong = torch.rand(200, generator=generator) < WRONG_SHARE
    shift = torch.randint(1, 10, (200,), generator=generator)
    return (x[:200], torch.where(is_wrong, (y[:200] + shift) % 10, y[:200])), (x[200:], y[200:])


def reweighting(hypergradient: mlo.Hypergradient, seed: int) -> mlo.Program:
    """The two levels on whole batches."""
    torch.manual_seed(seed)
    train, clean = digits(seed)
    weights, classifier = Values(torch.zeros(200, dtype=torch.float64)), Regression(64, 10).double()
    steps = dict(unroll_steps=40, hypergradient=hypergradient)
    levels = [
        Weigh("weights", weights, data=[clean], optimizer=partial(torch.optim.Adam, lr=0.1)),
        Classify("classifier", classifier, data=[train], optimizer=partial(torch.optim.SGD, lr=0.1), **steps),
    ]
    return mlo.Program(levels)


def many_steps() -> CheckReport:
    """The check after one step of the weights."""
    program = reweighting(mlo.Identity(), seed=0)
    program.run(1, progress=False)
    return mlo.check(program)


# ---- a level in the middle -------------------------------------------------------------------------------------------
class Top(mlo.Level):
    """``f1 = x^2 / 2 + y``."""

    def loss(self, y):
        """The loss."""
        return (self.module().square() / 2 + y()).sum()


class Middle(mlo.Level):
    """``f2 = y^2 / 2 - x y + c z^2 / 2``, with c = 3."""

    def loss(self, x, z):
        """The loss."""
        y = self.module()
        return (y.square() / 2 - x() * y + 3.0 * z().square() / 2).sum()


class Bottom(mlo.Level):
    """``f3 = (z - y)^2 / 2``, so that z* = y."""

    def loss(self, y):
        """The loss."""
        return ((self.module() - y()).square() / 2).sum()


def three_levels() -> mlo.Program:
    """With z* = y the middle level minimises 2 y^2 - x y: y* = x / 4, and df1/dx = x + 1/4."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    x, y = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    solver = mlo.ConjugateGradient(max_steps=5, tolerance=1e-12)
    levels = [
        Top("x", Values(x.clone()), optimizer=sgd),
        Middle("y", Values(y.clone()), optimizer=sgd, hypergradient=solver),
        Bottom("z", Values(y.clone()), optimizer=sgd, hypergradient=solver),
    ]
    return mlo.Program(levels)


def middle() -> CheckReport:
    """The gradient of the top level beside the two that the formulas give, and the check."""
    program = three_levels()
    found = program.gradients()["x"]["value"].item()
    rows = [["found", f"{found:.6f}"], ["total derivative", f"{0.8 + 1 / 4:.6f}"], ["partial ones", f"{0.8 + 1:.6f}"]]
    print(markdown_table(["df1/dx", "value"], rows))
    return mlo.check(program)


CASES = {"many_steps": many_steps, "middle": middle}


def main() -> None:
    """Run the cases and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="these alone")
    for name in parser.parse_args().only:
        print(f"== {name}")
        report = CASES[name]()
        print(markdown_table(report.header, report.rows))
        print(report.verdict)


if __name__ == "__main__":
    main()
