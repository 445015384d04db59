"""Adapt a promptable segmentation model to a new class from a few masks, prompt and decoder on different halves.

A picture holds two digits in noise; a prompt, an embedding p, says which digit the mask is of. Encoder, decoder and
the embeddings of some digits are trained first; then the encoder is frozen. For a digit that was not among them there
are a few pictures with masks. Above, its embedding on one half; below, the decoder w on the other half:

    min_p  mean_j l_j(w*(p), p)
    s.t.   w*(p) = argmin_w  mean_i l_i(w, p)

with l the mean binary cross entropy of the pixels. Baselines, each on both halves: the embedding alone; embedding and
decoder together; and these with as many steps as both levels take.

Reference: Zhang et al. 2024, "BLO-SAM: Bi-level Optimization Based Overfitting-Preventing Finetuning of SAM"
(arXiv:2402.16338). Here the model is a small convolutional network, not the Segment Anything Model, and the decoder is
trained as a whole.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scalemlo as mlo

from ..distributed.ranks import Ranks
from ..runs import config as cfg
from .data.images import load_images
from .study.recipe import Recipe
from .study.study import Cell, Comparison, ComparisonConfig, Outcome

NUM_KNOWN = 5
"""The model is trained on the digits below; the others are new."""


@dataclass(kw_only=True)
class PromptedSegmentationConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        targets: The new digits, from 5 to 9, each adapted to from the same model; scores are means over them.
        num_examples: Pictures with masks of a new digit.
        num_test: Test pictures of each.
        noise: Standard deviation of the noise, in that of the training images.
        num_pretraining: Pictures that the model is trained on before.
        pretraining_steps: Steps of that training.
        num_channels: Of the encoder's fine features; the coarse ones have twice as many.
        prompt_size: Of the embedding.
        steps: Steps of every adaptation.
        batch_size: Pictures per step of pretraining; adaptations take all.
        model: Optimizer of the pretraining.
        decoder: Optimizer of the decoder, in the two levels.
        together: Optimizer of decoder and embedding together.
        prompt: Optimizer of the embedding.
        hypergradient: How the embedding is differentiated through the decoder.
    """

    targets: list[int] = field(default_factory=lambda: [5, 7, 9])
    num_examples: int = 16
    num_test: int = 100
    noise: float = 0.3
    num_pretraining: int = 2000
    pretraining_steps: int = 300
    num_channels: int = 12
    prompt_size: int = 16
    steps: int = 80
    batch_size: int = 32
    model: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    decoder: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    together: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    prompt: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(default_factory=cfg.ESTIMATOR_CONFIGS["unrolled"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets or not set(self.targets) <= set(range(NUM_KNOWN, 10)):
            raise ValueError(f"targets={self.targets} must be some of {list(range(NUM_KNOWN, 10))}, the new digits")
        if self.num_examples < 2 or self.num_examples % 2:
            raise ValueError(f"num_examples={self.num_examples} must be even and positive, as it is halved")


# ---- pictures --------------------------------------------------------------------------------------------------------
def pictures(
    digits: Sequence[int], others: Sequence[int], count: int, noise: float, part: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures of a digit beside another one, in noise.

    Args:
        digits: Which the masks are of.
        others: Which may stand beside; never the same digit.
        count: Pictures N.
        noise: Its standard deviation.
        part: Of the images of digits, ``train`` or ``test``.
        generator: Draws.

    Returns:
        Pictures ``[N, 1, 16, 16]``, masks ``[N, 16, 16]`` and the digits ``[N]`` that these are of.
    """
    images = load_images("digits")
    x, y = (images.train_x, images.train_y) if part == "train" else (images.test_x, images.test_y)
    background = float(x.min())
    whole, mask = torch.full((count, 1, 16, 16), background), torch.zeros(count, 16, 16)
    labels = torch.empty(count, dtype=torch.long)

    def draw(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    def one(digit: int) -> Tensor:
        rows = (y == digit).nonzero().squeeze(1)
        return x[rows[draw(len(rows))], 0]

    for n in range(count):
        labels[n] = digits[draw(len(digits))]
        beside = [digit for digit in others if digit != int(labels[n])]
        side = 8 * draw(2)
        for left, digit in ((side, int(labels[n])), (8 - side, beside[draw(len(beside))])):
            image, top = one(digit), draw(9)
            whole[n, 0, top : top + 8, left : left + 8] = image
            if left == side:
                mask[n, top : top + 8, left : left + 8] = (image > 0).float()
    return whole + noise * torch.randn(whole.shape, generator=generator), mask, labels


# ---- the model -------------------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """Fine features ``[B, C, 16, 16]`` and coarse ones ``[B, 2 C, 4, 4]`` of pictures.

    Args:
        num_channels: C.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.fine = nn.Conv2d(1, num_channels, 3, padding=1)
        self.middle = nn.Conv2d(num_channels, 2 * num_channels, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(2 * num_channels, 2 * num_channels, 5, stride=2, padding=2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of pictures ``[B, 1, 16, 16]``."""
        fine = self.fine(images).relu()
        return fine, self.coarse(self.middle(fine).relu()).relu()


class Decoder(nn.Module):
    """Logits of masks: the prompt weighs the channels of the coarse features, which meet the fine ones.

    Args:
        num_channels: Of the encoder.
        prompt_size: Of the embedding.
    """

    def __init__(self, num_channels: int, prompt_size: int):
        super().__init__()
        self.gates = nn.Linear(prompt_size, 2 * num_channels)
        self.coarse = nn.Conv2d(2 * num_channels, num_channels, 1)
        self.mix = nn.Conv2d(2 * num_channels, num_channels, 3, padding=1)
        self.last = nn.Conv2d(num_channels, 1, 1)

    def forward(self, fine: Tensor, coarse: Tensor, prompt: Tensor) -> Tensor:
        """Logits ``[B, 16, 16]`` of features with a prompt ``[S]``, or one for each ``[B, S]``."""
        gates = self.gates(prompt.expand(len(fine), -1))[:, :, None, None]
        coarse = self.coarse(coarse * gates).relu().repeat_interleave(4, 2).repeat_interleave(4, 3)
        return self.last(self.mix(torch.cat([fine, coarse], 1)).relu()).squeeze(1)


class Prompt(nn.Module):
    """The embedding.

    Args:
        start: Its first value, ``[S]``.
    """

    def __init__(self, start: Tensor):
        super().__init__()
        self.embedding = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """``[S]``."""
        return self.embedding


class Promptable(nn.Module):
    """Encoder, decoder and the embeddings of the digits that are known.

    Args:
        num_channels: Of the encoder.
        prompt_size: Of the embeddings.
    """

    def __init__(self, num_channels: int, prompt_size: int):
        super().__init__()
        self.encoder, self.decoder = Encoder(num_channels), Decoder(num_channels, prompt_size)
        self.embeddings = nn.Embedding(NUM_KNOWN, prompt_size)

    def forward(self, images: Tensor, digits: Tensor) -> Tensor:
        """Logits ``[B, 16, 16]``."""
        return self.decoder(*self.encoder(images), self.embeddings(digits))


class Prompted(nn.Module):
    """Decoder and embedding in one module, for the baselines.

    Args:
        decoder: Of the model.
        prompt: The embedding.
    """

    def __init__(self, decoder: Decoder, prompt: Prompt):
        super().__init__()
        self.decoder, self.prompt = decoder, prompt

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Logits ``[B, 16, 16]``."""
        return self.decoder(fine, coarse, self.prompt())


# ---- the levels ------------------------------------------------------------------------------------------------------
class Ask(mlo.Level):
    """Upper level: masks of pictures that the decoder was not trained on."""

    def loss(self, batch, decoder):
        """Mean loss."""
        fine, coarse, masks = batch
        return losses(decoder(fine, coarse, self.module()), masks)


class Decode(mlo.Level):
    """Lower level: the decoder, given the embedding."""

    def loss(self, batch, prompt):
        """Mean loss."""
        fine, coarse, masks = batch
        return losses(self.module(fine, coarse, prompt()), masks)


class Fit(mlo.Level):
    """A model alone, whose inputs are all parts of a batch but the last, the masks."""

    def loss(self, batch):
        """Mean loss."""
        *inputs, masks = batch
        return losses(self.module(*inputs), masks)


def losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean binary cross entropy of the pixels."""
    return mlo.mean(F.binary_cross_entropy_with_logits(logits, masks, reduction="none"))


def pretrained(cell: Cell[PromptedSegmentationConfig]) -> Promptable:
    """The model, trained on the digits that are known; the same one for every arm of a seed."""
    config = cell.config
    torch.manual_seed(cell.seed)
    generator, known = torch.Generator().manual_seed(cell.seed), range(NUM_KNOWN)
    images, masks, digits = pictures(known, known, config.num_pretraining, config.noise, "train", generator)
    data = DataLoader(TensorDataset(images, digits, masks), config.batch_size, shuffle=True, drop_last=True)
    model = Promptable(config.num_channels, config.prompt_size)
    level = Fit(
        "model", model, data=data, optimizer=config.model.optimizer(),
        scheduler=config.model.scheduler(config.pretraining_steps),
    )  # fmt: skip
    program = cell.program([level])
    cell.train(program, config.pretraining_steps)
    found = Promptable(config.num_channels, config.prompt_size)
    found.load_state_dict(Ranks().from_main(program.state_dict("model")))
    return found


Features = tuple[Tensor, Tensor, Tensor]
"""Fine and coarse features of pictures, and their masks."""


@torch.no_grad()
def features(cell: Cell[PromptedSegmentationConfig], model: Promptable, target: int, part: str) -> Features:
    """Draw pictures of a new digit beside any other one, and encode them."""
    config = cell.config
    generator = torch.Generator().manual_seed(100 * cell.seed + target)
    count = config.num_examples if part == "train" else config.num_test
    images, masks, _ = pictures([target], range(10), count, config.noise, part, generator)
    return *model.encoder(images), masks


def _start(model: Promptable) -> Prompt:
    """The mean of the known embeddings."""
    return Prompt(model.embeddings.weight.detach().mean(0))


def two_levels(cell: Cell[PromptedSegmentationConfig], model: Promptable, data: Features) -> mlo.Program:
    """The two levels; each has all pictures of its half in every batch."""
    config, half = cell.config, len(data[0]) // 2
    return cell.program(
        [
            Ask(
                "prompt", _start(model), data=[tuple(part[half:] for part in data)],
                optimizer=config.prompt.optimizer(), scheduler=config.prompt.scheduler(config.steps),
            ),
            Decode(
                "decoder", copy.deepcopy(model.decoder), data=[tuple(part[:half] for part in data)],
                optimizer=config.decoder.optimizer(), scheduler=config.decoder.scheduler(config.steps),
                hypergradient=config.hypergradient.build(),
            ),
        ]
    )  # fmt: skip


def dice(logits: Tensor, masks: Tensor) -> float:
    """Mean over pictures of ``2 |A and B| / (|A| + |B|)``, A the predicted and B the true mask, in percent."""
    found = (logits > 0).float()
    overlap = (found * masks).sum((1, 2))
    return 100 * float((2 * overlap / (found.sum((1, 2)) + masks.sum((1, 2)))).mean())


def by_halves(cell: Cell[PromptedSegmentationConfig], model: Promptable, data: Features, test: Features) -> float:
    """The two levels.

    Args:
        cell: The arm and its seed.
        model: The pretrained model.
        data: Features and masks to adapt to.
        test: To test on.

    Returns:
        Dice coefficient in percent.
    """
    program = two_levels(cell, model, data)
    cell.train(program, cell.config.steps)
    fine, coarse, masks = (part.to(program.device) for part in test)
    with program.inference("prompt") as prompt:
        embedding = prompt()
    with program.inference("decoder") as decoder:
        return dice(decoder(fine, coarse, embedding), masks)


def together(
    cell: Cell[PromptedSegmentationConfig], model: Promptable, data: Features, test: Features, *,
    prompt_alone: bool = False, is_longer: bool = False,
) -> float:  # fmt: skip
    """A baseline, on both halves.

    Args:
        cell: The arm and its seed.
        model: The pretrained model.
        data: Features and masks to adapt to.
        test: To test on.
        prompt_alone: Whether the decoder stays as it is; else one optimizer trains both.
        is_longer: Whether to take three times the steps: two levels with one unrolled step take about as long.

    Returns:
        Dice coefficient in percent.
    """
    config = cell.config
    optimizer = config.prompt if prompt_alone else config.together
    steps = config.steps * (3 if is_longer else 1)
    level = Fit(
        "prompted", Prompted(copy.deepcopy(model.decoder), _start(model)), data=[data],
        parameters="prompt.*" if prompt_alone else None, optimizer=optimizer.optimizer(),
        scheduler=optimizer.scheduler(steps),
    )  # fmt: skip
    program = cell.program([level])
    cell.train(program, steps)
    fine, coarse, masks = (part.to(program.device) for part in test)
    with program.inference("prompted") as prompted:
        return dice(prompted(fine, coarse), masks)


def over_targets(cell: Cell[PromptedSegmentationConfig], one: Callable[..., float], **options: bool) -> Outcome:
    """Adapt to every new digit in turn, from the same model."""
    model = pretrained(cell)
    found = [
        one(cell, model, features(cell, model, target, "train"), features(cell, model, target, "test"), **options)
        for target in cell.config.targets
    ]
    return Outcome({"dice, %": float(np.mean(found))}, {"dice": np.array(found)})


def draw(axes, outcomes, config: PromptedSegmentationConfig) -> None:
    """Dice coefficient of every new digit, mean over seeds."""
    width = 0.8 / len(outcomes)
    for i, (arm, found) in enumerate(outcomes.items()):
        means = np.mean([outcome.arrays["dice"] for outcome in found], 0)
        axes.bar(np.arange(len(means)) + (i - (len(outcomes) - 1) / 2) * width, means, width, label=arm)
    axes.set_xticks(range(len(config.targets)), [f"digit {target}" for target in config.targets])
    axes.set_title("dice of every new digit, %: mean over seeds", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)


ARMS = {
    "prompt alone": partial(over_targets, one=together, prompt_alone=True),
    "prompt and decoder together": partial(over_targets, one=together),
    "together, longer": partial(over_targets, one=together, is_longer=True),
    "blo-sam": partial(over_targets, one=by_halves),
}


def build(config: PromptedSegmentationConfig) -> mlo.Program:
    """The two levels for the first new digit, with a model that is not pretrained."""
    cell = Cell(config, "blo-sam", config.seed)
    torch.manual_seed(cell.seed)
    model = Promptable(config.num_channels, config.prompt_size)
    return two_levels(cell, model, features(cell, model, config.targets[0], "train"))


def run(config: PromptedSegmentationConfig) -> bool:
    """All arms.

    Args:
        config: The configuration.

    Returns:
        Whether Ctrl-C ended it early.
    """
    return Comparison(config, ARMS, partial(draw, config=config)).run()


RECIPE = Recipe(
    PromptedSegmentationConfig,
    build,
    run,
    "adapt a promptable segmentation model to a new class, the prompt and the decoder on different halves of the data",
    "Zhang et al. 2024, BLO-SAM: Bi-level Optimization Based Overfitting-Preventing Finetuning of SAM "
    "(arXiv:2402.16338)",
)
