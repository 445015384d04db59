"""Meta-Weight-Net on three data sets, trained by scalemlo and by Betty, from the same file; and its plain steps.

A task holds the modules with their first weights, the data, and which examples every step takes, so that both packages
start at one point and see one sequence of batches. :func:`train_scalemlo` and :func:`train_betty` are as a user of each
package would write them. Both minimise ``sum_i V(l_i) l_i / sum_i V(l_i)`` below and the mean loss of clean examples
above; scalemlo takes both gradients at one point, Betty the upper one after the lower step.

Reference: Shu et al. 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting" (arXiv:1902.07379).
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

Part = tuple[Tensor, Tensor]
"""Inputs ``[N, ...]`` and labels ``[N]``."""

LOWER_OPTIMIZERS = {
    "long tail": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "label noise": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0),
    "weak labels": partial(torch.optim.AdamW, lr=3e-4, weight_decay=1.0),
}
"""The classifier's, as in the recipes long_tail, label_noise and label_correction."""

ESTIMATORS = {"scalemlo": ("identity", "sama"), "betty": ("darts", "sama"), "torch": ("none",)}
"""By package, in the order of their equals: the first takes the identity for the inverse Hessian."""


def estimators(package: str, task: str) -> tuple[str, ...]:
    """Those that differ: under SGD, SAMA is the identity up to a factor, which AdamW above does not see."""
    return ESTIMATORS[package][:1] if LOWER_OPTIMIZERS[task].func is torch.optim.SGD else ESTIMATORS[package]


@dataclass
class Task:
    """What is trained on, from which point, in which order.

    Attributes:
        name: A key of :data:`LOWER_OPTIMIZERS`.
        classifier: The lower module.
        weight_net: The upper module.
        train: The lower level's data.
        clean: The upper level's.
        validation: Picks moment and hyper-parameters.
        test: Is reported.
        train_order: Rows of ``train`` that each step takes ``[steps, B]``.
        clean_order: Rows of ``clean`` ``[steps, C]``.
    """

    name: str
    classifier: nn.Module
    weight_net: nn.Module
    train: Part
    clean: Part
    validation: Part
    test: Part
    train_order: Tensor
    clean_order: Tensor


@dataclass(frozen=True)
class Batches:
    """One batch a step, over and over."""

    part: Part
    order: Tensor  # [steps, B]

    def __iter__(self) -> Iterator[Part]:
        return ((self.part[0][rows], self.part[1][rows]) for rows in self.order)


Advance = Callable[[int], None]
"""Takes some outer steps."""


# ---- tasks -----------------------------------------------------------------------------------------------------------
def write_task(name: str, seed: int, steps: int, path: Path, *, tiny: bool) -> None:
    """Make a task from the recipe it belongs to.

    Args:
        name: A key of :data:`LOWER_OPTIMIZERS`.
        seed: Draws parts, wrong labels, first weights and batches.
        steps: Outer steps.
        path: Where to save it.
        tiny: Whether all are made of digits, which need no download.
    """
    from scalemlo.recipes import CONFIGS, label_correction, label_noise, long_tail
    from scalemlo.recipes.data.images import SmallCNN
    from scalemlo.runs import config as cfg

    recipe = {"long tail": long_tail, "label noise": label_noise, "weak labels": label_correction}[name]
    overrides = ["data=digits"] if tiny else []
    overrides += ["num_largest=80"] if tiny and name == "long tail" else []
    file = Path(__file__).parent.parent / "configs" / f"{recipe.__name__.rpartition('.')[2]}.yaml"
    config = cfg.load(file, overrides, CONFIGS)
    data = recipe.split(config, seed)  # type: ignore[attr-defined]
    train = data.weak if name == "weak labels" else data.train
    clean = data.meta if name == "long tail" else data.clean
    parts = [part.tensors[:2] for part in (train, clean, data.validation, data.test)]
    torch.manual_seed(seed)
    x = parts[0][0]
    if name == "weak labels":
        classifier: nn.Module = nn.Linear(x.shape[1], data.num_classes)
    else:
        cnn = SmallCNN(x.shape[-1])
        classifier = nn.Sequential(*cnn.features, cnn.head)
    weight_net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    orders = [epochs(len(part[1]), min(config.batch_size, len(part[1])), steps) for part in parts[:2]]
    torch.save(Task(name, classifier, weight_net, *parts, *orders), path)


def epochs(num_examples: int, batch_size: int, steps: int) -> Tensor:
    """Rows of every batch ``[steps, batch_size]``: shuffled anew in every epoch, the rest of each left out."""
    per_epoch = num_examples // batch_size
    shuffled = [torch.randperm(num_examples)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return torch.cat(shuffled).view(-1, batch_size)[:steps]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every example ``[B]``."""
    return F.cross_entropy(logits, labels, reduction="none")


@torch.no_grad()
def accuracy(classifier: nn.Module, part: Part) -> float:
    """Share of the examples that are classified rightly, in %."""
    classifier.eval()
    right = (classifier(part[0]).argmax(1) == part[1]).float().mean()
    classifier.train()
    return 100 * float(right)


# ---- the packages ----------------------------------------------------------------------------------------------------
def train_scalemlo(task: Task, estimator: str, upper_learning_rate: float) -> Advance:
    """Set up scalemlo."""
    import scalemlo as mlo

    class Outer(mlo.Level):
        def loss(self, batch, inner):
            return mlo.mean(losses(inner(batch[0]), batch[1]))

    class Inner(mlo.Level):
        def loss(self, batch, outer):
            found = losses(self.module(batch[0]), batch[1])
            return mlo.weighted_mean(found, outer(found.detach().unsqueeze(1)).squeeze(1))

    program = mlo.Program(
        [
            Outer(
                "outer",
                task.weight_net,
                data=Batches(task.clean, task.clean_order),
                optimizer=partial(torch.optim.AdamW, lr=upper_learning_rate, weight_decay=0.0),
            ),
            Inner(
                "inner",
                task.classifier,
                data=Batches(task.train, task.train_order),
                optimizer=LOWER_OPTIMIZERS[task.name],
                scheduler=partial(CosineAnnealingLR, T_max=len(task.train_order)),
                hypergradient={"identity": mlo.Identity, "sama": mlo.SAMA}[estimator](),
            ),
        ]
    )

    def advance(steps: int) -> None:
        program.run(steps, progress=False)

    return advance


def train_betty(task: Task, estimator: str, upper_learning_rate: float) -> Advance:
    """Set up Betty, as its own example of Meta-Weight-Net does."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.logging.logger_base import get_logger
    from betty.problems import ImplicitProblem

    get_logger().setLevel(logging.WARNING)

    class Problem(ImplicitProblem):
        def patch_optimizer(self):  # would make it anew from its defaults, which torch's AdamW no longer takes
            pass

    class Outer(Problem):
        def training_step(self, batch):
            return losses(self.inner(batch[0]), batch[1]).mean()

    class Inner(Problem):
        def training_step(self, batch):
            found = losses(self.module(batch[0]), batch[1])
            weights = self.outer(found.detach().unsqueeze(1)).squeeze(1)
            return (weights * found).sum() / weights.sum()

    outer = Outer(
        name="outer",
        config=Config(),
        module=task.weight_net,
        optimizer=torch.optim.AdamW(task.weight_net.parameters(), lr=upper_learning_rate, weight_decay=0.0),
        train_data_loader=Batches(task.clean, task.clean_order),
    )
    optimizer = LOWER_OPTIMIZERS[task.name](task.classifier.parameters())
    inner = Inner(
        name="inner",
        config=Config(type=estimator, unroll_steps=1),
        module=task.classifier,
        optimizer=optimizer,
        scheduler=CosineAnnealingLR(optimizer, T_max=len(task.train_order)),
        train_data_loader=Batches(task.train, task.train_order),
    )
    engine = Engine([outer, inner], EngineConfig(strategy="cpu"), {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}})

    def advance(steps: int) -> None:
        engine.train_iters = steps
        engine.run()

    return advance


def train_plain(task: Task, estimator: str, upper_learning_rate: float) -> Advance:
    """The two gradients and steps that every method takes, in plain torch: without a hypergradient, and so no use."""
    lower = LOWER_OPTIMIZERS[task.name](task.classifier.parameters())
    upper = torch.optim.AdamW(task.weight_net.parameters(), lr=upper_learning_rate, weight_decay=0.0)
    scheduler = CosineAnnealingLR(lower, T_max=len(task.train_order))
    train = itertools.chain.from_iterable(itertools.repeat(Batches(task.train, task.train_order)))
    clean = itertools.chain.from_iterable(itertools.repeat(Batches(task.clean, task.clean_order)))

    def advance(steps: int) -> None:
        for _ in range(steps):
            inputs, labels = next(clean)
            torch.autograd.grad(losses(task.classifier(inputs), labels).mean(), list(task.classifier.parameters()))
            inputs, labels = next(train)
            found = losses(task.classifier(inputs), labels)
            weights = task.weight_net(found.detach().unsqueeze(1)).squeeze(1)
            lower.zero_grad()
            upper.zero_grad()
            ((weights * found).sum() / weights.sum()).backward()
            lower.step()
            scheduler.step()
            upper.step()

    return advance


PACKAGES = {"scalemlo": train_scalemlo, "betty": train_betty, "torch": train_plain}
"""What sets a run up: ``PACKAGES[name](task, estimator, upper_learning_rate)`` gives what takes its steps."""
