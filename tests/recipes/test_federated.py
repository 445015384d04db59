"""The federated recipe: short runs of all arms, hypergradient, and that ranks see their own client's examples alone."""

import torch
import torch.nn.functional as F

import scalemlo as mlo
from scalemlo.recipes import federated
from scalemlo.recipes.study.study import Cell
from scalemlo.runs import config as cfg
from tests.ranks import run_ranks
from tests.recipes.fast import run_fast


def config_of(**options) -> federated.FederatedConfig:
    few = dict(num_train_per_site=6, num_meta_per_site=4, num_test_per_site=5, proximity=0.5)
    return federated.FederatedConfig(recipe="federated", output_dir="", **few, **options)


def cell_of(config: federated.FederatedConfig) -> Cell:
    return Cell(config, "three levels", 0)


def test_all_arms_run_and_sharing_helps():
    """On few examples a site alone is worse than one model of all sites."""
    result = run_fast(
        "federated", "num_test_per_site=60", "num_train_per_site=8", "num_meta_per_site=4", "steps=2", "rounds=15",
        "final_steps=40",
    )  # fmt: skip
    found = {arm: scores["accuracy, %"][0] for arm, scores in result["arms"].items()}
    assert list(found) == list(federated.ARMS)
    assert found["FedAvg"] > found["each site alone"] + 2 > 20


def test_examples_are_disjoint_skewed_and_ordered():
    data = federated.split(federated.FederatedConfig(recipe="federated", output_dir=""), 0)
    x = torch.cat([data.train[0], data.meta[0]])
    assert len(x.unique(dim=0)) == len(x)
    x, y, site = data.both
    assert torch.equal(site, torch.arange(6).repeat_interleave(30))
    low = (y < 5).view(2, -1).float().mean(1)
    assert low[0] > 0.75 and low[1] < 0.25


def test_the_servers_gradient_is_that_of_the_best_responses(fp64):
    """Through clients and sites at their optimum, by autograd through dense solves of the same two systems."""
    config = config_of(hypergradient=cfg.ESTIMATOR_CONFIGS["conjugate_gradient"](max_steps=2000, tolerance=1e-12))
    data = doubled(federated.split(config, 0))
    program = federated.three_levels(cell_of(config), data)
    torch.manual_seed(1)
    for trainer in program.trainers.values():
        for parameter in trainer.engine.module.parameters():
            torch.nn.init.normal_(parameter.data, std=0.1)
    found = program.gradients()["server"]["weight"]

    u, v = (program.trainers[name].engine.module.weight.detach() for name in ("clients", "sites"))
    expected = torch.zeros(u[0].numel())
    for client in range(config.num_clients):
        sites = range(client * config.sites_per_client, (client + 1) * config.sites_per_client)
        total = torch.zeros(u[0].numel())
        for site in sites:
            slope = torch.func.grad(site_loss)(v[site].flatten(), data.meta, [site])
            total += config.proximity * torch.linalg.solve(hessian(v[site], data.train, [site], config), slope)
        expected += config.proximity * torch.linalg.solve(hessian(u[client], data.train, list(sites), config), total)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-9)


def site_loss(weight: torch.Tensor, part, sites) -> torch.Tensor:
    """Sum over sites of their mean losses at one model ``[D]``."""
    x, y, site = part
    weight = weight.view(-1, 10)
    return sum(F.cross_entropy(x[site == s] @ weight[:-1] + weight[-1], y[site == s]) for s in sites)


def hessian(weight, part, sites, config) -> torch.Tensor:
    whole = torch.func.hessian(site_loss)(weight.flatten(), part, sites)
    return whole + config.proximity * torch.eye(len(whole))


def doubled(data: federated.Split) -> federated.Split:
    for name in ("train", "meta", "test"):
        x, *rest = getattr(data, name)
        setattr(data, name, (x.double(), *rest))
    return data


def test_two_ranks_are_two_clients_and_compute_what_one_process_does():
    def body(rank, world_size, engine):
        config = config_of(engine=cfg.ENGINE_CONFIGS[engine]())
        program = federated.three_levels(cell_of(config), federated.split(config, 0))
        program.run(2, progress=False)
        seen = {name: trainer.batches[0][2].tolist() for name, trainer in program.trainers.items()}
        return seen, {name: program.state_dict(name) for name in program.trainers}

    alone = run_ranks(body, 1, "single")[0][1]
    ranks = run_ranks(body, 2, "ddp")
    for rank, (seen, _) in enumerate(ranks):
        assert all({s // 3 for s in sites} == {rank} for sites in seen.values())
    for name, state in alone.items():
        assert state["weight"].norm() > 0
        torch.testing.assert_close(ranks[0][1][name]["weight"], state["weight"], rtol=1e-4, atol=1e-5)


def test_derivatives_agree():
    report = mlo.check(federated.three_levels(cell_of(config_of()), federated.split(config_of(), 0)))
    assert report.passed, report.verdict


def test_federated_averaging_ends_in_one_model_for_all():
    """One local step a round is gradient descent on the mean loss of all sites."""
    config = config_of(rounds=3, local_steps=1, rows=cfg.OptimizerConfig(type="sgd", learning_rate=0.1))
    data = federated.split(config, 0)
    rows = federated.federated_averaging(cell_of(config), data).trainers["sites"].engine.module.weight.detach()
    assert rows.norm() > 0 and torch.equal(rows, rows[:1].expand_as(rows))
    weight = torch.zeros(rows[0].numel())
    for _ in range(3):
        weight -= 0.1 * torch.func.grad(site_loss)(weight, data.both, range(6)) / 6
    torch.testing.assert_close(rows[0].flatten(), weight, rtol=1e-4, atol=1e-6)
