"""Classify at sites that share weights, not examples: a server above clients above their sites.

Client k has some sites s, whose examples are mostly of the client's half of the classes. A softmax regression z at the
server, u_k at every client, v_s at every site; each is held near the one above it by a consensus penalty:

    min_z   sum_s  L_s(v*_s(z); held back)
    s.t.    u*_k(z) = argmin_u  sum_{s of k} L_s(u; train) + c/2 |u - z|^2
            v*_s(z) = argmin_v  L_s(v; train) + c/2 |v - u*_k(z)|^2

with L_s the mean loss over examples of site s. Afterwards z is fixed, and the clients, then the sites, are trained on
all examples. Every process runs the same program. The weights of all clients (and sites) are rows of one parameter,
which every rank holds; examples are ordered by client, so that on as many ranks as clients each sees its own client's
alone, and what moves between ranks are gradients. A rank gives the rows of other clients none: their sum over ranks is
the exchange.

Baselines on the same examples: each site alone; FedAvg, one model that all sites take some steps from, and their mean;
each site near the FedAvg model (Ditto).

Reference: Jiao et al. 2023, "Provably Convergent Federated Trilevel Learning" (arXiv:2312.11835), for levels over
clients in consensus, here a penalty, synchronous, without their cutting planes; Rajeswaran et al. 2019, "Meta-Learning
with Implicit Gradients" (arXiv:1909.04630), for the server's derivative through a proximal step. Baselines: McMahan et
al. 2017 (arXiv:1602.05629); Li et al. 2021, "Ditto" (arXiv:2012.04221).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import scalemlo as mlo

from ..runs import config as cfg
from .data.images import load_images
from .study.classification import losses
from .study.recipe import Recipe
from .study.study import Cell, ComparisonConfig, Outcome, compared

NUM_CLASSES = 10


@dataclass(kw_only=True)
class FederatedConfig(ComparisonConfig):
    """Configuration of this recipe.

    Args:
        num_clients: Clients; as many ranks, or one that has them all.
        sites_per_client: Sites of each.
        own_share: Share of a client's half of the classes among its examples, on average over sites.
        concentration: Of the Dirichlet distribution that sites draw their class shares from; small ones differ much.
        num_train_per_site: Examples that clients and sites are trained on.
        num_meta_per_site: Examples that the server's model is learned from; baselines train on them too.
        num_test_per_site: Test examples, drawn with the class shares of the site.
        proximity: c, between server, clients and sites, and between sites and the FedAvg model.
        shrinkage: The same between a site alone and zero.
        steps: Steps of the server.
        client_steps: Steps of the clients between two of the server.
        site_steps: Steps of the sites between two of the clients.
        final_steps: Steps of clients, then of sites, on all examples, with what is above fixed; also of sites alone.
        rounds: Averages of FedAvg.
        local_steps: Steps of a site between two averages.
        server: The server's optimizer.
        rows: The optimizer of clients and sites, and of the baselines.
        hypergradient: How the server differentiates through clients and sites.

    Raises:
        ValueError: If ``own_share`` is no share.
    """

    num_clients: int = 2
    sites_per_client: int = 3
    own_share: float = 0.9
    concentration: float = 10.0
    num_train_per_site: int = 20
    num_meta_per_site: int = 10
    num_test_per_site: int = 200
    proximity: float = 0.1
    shrinkage: float = 0.01
    steps: int = 50
    client_steps: int = 3
    site_steps: int = 3
    final_steps: int = 300
    rounds: int = 60
    local_steps: int = 5
    server: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    rows: cfg.OptimizerConfig = field(default_factory=cfg.OptimizerConfig)
    hypergradient: cfg.HypergradientConfig = field(
        default_factory=lambda: cfg.ESTIMATOR_CONFIGS["conjugate_gradient"](max_steps=20, tolerance=1e-3)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.own_share < 1:
            raise ValueError(f"own_share={self.own_share} must be between 0 and 1")

    @property
    def num_sites(self) -> int:
        """Sites of all clients."""
        return self.num_clients * self.sites_per_client


class Models(nn.Module):
    """Softmax regressions, one a row of the parameters.

    Args:
        num_models: K.
        num_features: F.
    """

    def __init__(self, num_models: int, num_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_models, num_features + 1, NUM_CLASSES))

    def forward(self, inputs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, F]`` by the models ``[B]``; without inputs the parameters ``[K, D]``."""
        if inputs is None:
            return self.weight.flatten(1)
        images, model = inputs
        weight = self.weight[model]  # [B, F + 1, 10]
        return torch.einsum("bf,bfc->bc", images, weight[:, :-1]) + weight[:, -1]


def distance(own: Tensor, above: Tensor) -> Tensor:
    """``sum_k |own_k - above_k|^2 / 2`` of rows ``[K, D]``."""
    return (own - above).square().sum() / 2


class Serve(mlo.Level):
    """Upper level: sites should do well on examples that were held back."""

    def loss(self, batch, sites):
        """Sum over sites of their mean losses."""
        return mlo.mean(losses(sites, ((batch[0], batch[2]), batch[1]))) * sites().shape[0]


class Rows(mlo.Level):
    """Levels of clients and sites: ``of_site`` ``[S]`` is the row of a site, ``above`` ``[K]`` the one above a row."""

    of_site: Tensor
    above: Tensor
    proximity: float

    def near(self, batch, rows: Tensor) -> Tensor:
        """Sum over sites of their mean losses, and the distance from the rows above."""
        inputs = batch[0], self.of_site.to(batch[2].device)[batch[2]]
        fit = mlo.mean(losses(self.module, (inputs, batch[1]))) * len(self.of_site)
        return fit + self.proximity * distance(self.module(), rows[self.above])


class Clients(Rows):
    """Middle level: near the server's model."""

    def loss(self, batch, server):
        """See :meth:`Rows.near`."""
        return self.near(batch, server())


class Sites(Rows):
    """Lower level: near the client's model."""

    def loss(self, batch, clients):
        """See :meth:`Rows.near`."""
        return self.near(batch, clients())


class NearFixed(Rows):
    """Clients or sites near models ``[K, D]`` that do not change."""

    anchor: Tensor

    def loss(self, batch):
        """See :meth:`Rows.near`."""
        return self.near(batch, self.anchor)


@dataclass
class Split:
    """Images ``[B, F]``, labels and sites of the parts, ordered by site and with as many examples of each."""

    train: tuple[Tensor, Tensor, Tensor]
    meta: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    shares: np.ndarray

    @property
    def both(self) -> tuple[Tensor, Tensor, Tensor]:
        """Training and meta examples of every site, ordered by site."""
        order = torch.cat([self.train[2], self.meta[2]]).sort(stable=True).indices
        x, y, site = (torch.cat(pair)[order] for pair in zip(self.train, self.meta, strict=True))
        return x, y, site


def split(config: FederatedConfig, seed: int) -> Split:
    """Draw class shares of the sites, then disjoint training and meta examples, and test examples of their own pool.

    Args:
        config: The configuration.
        seed: Draws.

    Returns:
        The parts.

    Raises:
        ValueError: If there are too few digits of some class.
    """
    images, draw = load_images("digits"), np.random.default_rng(seed)
    left = [draw.permutation(np.flatnonzero(images.train_y.numpy() == c)).tolist() for c in range(NUM_CLASSES)]
    pool = [np.flatnonzero(images.test_y.numpy() == c) for c in range(NUM_CLASSES)]
    per_site = config.num_train_per_site, config.num_meta_per_site, config.num_test_per_site
    rows: list[list[int]] = [[], [], []]
    shares = []
    for site in range(config.num_sites):
        client = site // config.sites_per_client
        is_own = np.arange(NUM_CLASSES) * config.num_clients // NUM_CLASSES == client
        prior = np.where(is_own, config.own_share / is_own.sum(), (1 - config.own_share) / (~is_own).sum())
        share = draw.dirichlet(config.concentration * prior)
        shares.append(share)
        for part, count in enumerate(per_site[:2]):
            for label in draw.choice(NUM_CLASSES, count, p=share):
                if not left[label]:
                    raise ValueError(
                        f"num_train_per_site={per_site[0]} and num_meta_per_site={per_site[1]} at {config.num_sites} "
                        f"sites use up all digits {label}; ask for fewer"
                    )
                rows[part].append(left[label].pop())
        rows[2] += [int(draw.choice(pool[label])) for label in draw.choice(NUM_CLASSES, per_site[2], p=share)]
    parts = []
    for part, (x, y) in enumerate([(images.train_x, images.train_y)] * 2 + [(images.test_x, images.test_y)]):
        site = torch.arange(config.num_sites).repeat_interleave(per_site[part])
        parts.append((x[rows[part]].flatten(1), y[rows[part]], site))
    return Split(parts[0], parts[1], parts[2], np.stack(shares))


def three_levels(cell: Cell[FederatedConfig], data: Split) -> mlo.Program:
    """Server, clients and sites, untrained."""
    config = cell.config
    solve = config.hypergradient.build
    features = data.train[0].shape[1]
    server = Serve("server", Models(1, features), data=[data.meta], optimizer=config.server.optimizer())
    levels = [
        server,
        _clients(config, data.train, Clients, unroll_steps=config.client_steps, hypergradient=solve()),
        _sites(config, data.train, Sites, unroll_steps=config.site_steps, hypergradient=solve()),
    ]
    return cell.program(levels)


R = TypeVar("R", bound=Rows)


def _clients(config: FederatedConfig, data: tuple[Tensor, ...], kind: type[R], **options) -> R:
    level = kind("clients", Models(config.num_clients, data[0].shape[1]), **_options(config, data), **options)
    level.of_site = torch.arange(config.num_sites) // config.sites_per_client
    level.above = torch.zeros(config.num_clients, dtype=torch.long)
    level.proximity = config.proximity
    return level


def _sites(config: FederatedConfig, data: tuple[Tensor, ...], kind: type[R], **options) -> R:
    level = kind("sites", Models(config.num_sites, data[0].shape[1]), **_options(config, data), **options)
    level.of_site = torch.arange(config.num_sites)
    level.above = level.of_site // config.sites_per_client
    level.proximity = config.proximity
    return level


def _options(config: FederatedConfig, data: tuple[Tensor, ...]) -> dict:
    return dict(data=[data], optimizer=config.rows.optimizer())


def learned(cell: Cell[FederatedConfig]) -> Outcome:
    """The three levels, then clients and sites on all examples near the server's model."""
    config, data = cell.config, split(cell.config, cell.seed)
    program = three_levels(cell, data)
    cell.train(program, config.steps)
    clients = _clients(config, data.both, NearFixed)
    clients.anchor = _parameters(program, "server")
    final = cell.program([clients])
    cell.train(final, config.final_steps)
    return _near(cell, data, _parameters(final, "clients"), config.proximity)


def alone(cell: Cell[FederatedConfig]) -> Outcome:
    """A baseline: every site near zero."""
    data = split(cell.config, cell.seed)
    return _near(cell, data, torch.zeros_like(Models(1, data.train[0].shape[1])().detach()), cell.config.shrinkage)


def averaged(cell: Cell[FederatedConfig], *, near: bool) -> Outcome:
    """A baseline: FedAvg.

    Args:
        cell: The arm and its seed.
        near: Whether sites then train models of their own near the average.

    Returns:
        What it found.
    """
    data = split(cell.config, cell.seed)
    program = federated_averaging(cell, data)
    if not near:
        return Outcome(_scores(program, data))
    return _near(cell, data, _parameters(program, "sites")[:1], cell.config.proximity)


def federated_averaging(cell: Cell[FederatedConfig], data: Split) -> mlo.Program:
    """Rounds of local steps on all examples, after each of which all sites get the mean of their models.

    Args:
        cell: The arm and its seed.
        data: The parts; sites have as many examples, so that the mean has no weights.

    Returns:
        The trained program, whose level ``sites`` has the same model in every row.
    """
    config = cell.config
    level = _sites(config, data.both, NearFixed)
    level.anchor, level.proximity = torch.zeros_like(level.module()[:1]).detach(), 0.0
    level.above = torch.zeros_like(level.of_site)
    program = cell.program([level])
    for _ in range(config.rounds):
        cell.train(program, config.local_steps)
        with torch.no_grad():
            for parameter in program.trainers["sites"].engine.module.parameters():
                parameter.copy_(parameter.mean(0, keepdim=True).expand_as(parameter))
    return program


def _near(cell: Cell[FederatedConfig], data: Split, anchor: Tensor, proximity: float) -> Outcome:
    """Sites on all examples near a model for all, ``[1, D]``, or one for each client."""
    level = _sites(cell.config, data.both, NearFixed)
    level.anchor, level.proximity = anchor, proximity
    level.above = level.above if len(anchor) > 1 else torch.zeros_like(level.above)
    program = cell.program([level])
    cell.train(program, cell.config.final_steps)
    return Outcome(_scores(program, data), {"shares": data.shares})


def _parameters(program: mlo.Program, level: str) -> Tensor:
    with program.inference(level) as models:
        return models().clone()


def _scores(program: mlo.Program, data: Split) -> dict[str, float]:
    x, y, site = data.test
    with program.inference("sites") as models:
        right = (models((x, site)).argmax(1) == y).double()
    by_site = 100 * torch.stack([right[site == s].mean() for s in site.unique()])
    return {"accuracy, %": float(by_site.mean()), "worst site, %": float(by_site.min())}


def draw(axes, outcomes) -> None:
    """Class shares of the sites with the first seed."""
    found = next((o.arrays["shares"] for o in outcomes.get("three levels", ())), None)
    if found is None:
        return
    image = axes.imshow(found, cmap="Greens", vmin=0, aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    axes.set(xlabel="digit", ylabel="site", xticks=range(NUM_CLASSES), yticks=range(len(found)))
    axes.set_title("Class shares of the sites, first seed", fontsize=10, loc="left")


ARMS = {
    "each site alone": alone,
    "FedAvg": partial(averaged, near=False),
    "near FedAvg": partial(averaged, near=True),
    "three levels": learned,
}


def build(config: FederatedConfig) -> mlo.Program:
    """The three levels, untrained."""
    cell = Cell(config, "three levels", config.seed)
    torch.manual_seed(cell.seed)
    return three_levels(cell, split(config, config.seed))


RECIPE = Recipe(
    FederatedConfig,
    build,
    compared(ARMS, draw),
    "classify at sites of several clients that share weights, not examples; three levels with consensus penalties",
    "Jiao et al. 2023, Provably Convergent Federated Trilevel Learning (arXiv:2312.11835)",
)
