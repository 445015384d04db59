"""Levels from functions, and strings where people write them: what they make is what a subclass and objects make."""

import functools

import pytest
import torch
from torch import nn

import scalemlo as mlo

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def net(seed: int, size: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, size).double()


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(8, n, generator=g, dtype=torch.float64) for n in (3, 1)) for _ in range(3)]


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().squeeze(-1)


def fit(batch, weights, model):
    return mlo.weighted_mean(squared(model, batch), weights(batch[0]).sigmoid().squeeze(-1))


def validate(batch, model):
    return mlo.mean(squared(model, batch))


class Weights(mlo.Level):
    def loss(self, batch, model):
        return validate(batch, model)


class Model(mlo.Level):
    def loss(self, batch, weights):
        return fit(batch, weights, self.module)


def upper(batch, model: mlo.Lower):
    return validate(batch, model)


def test_functions_train_as_subclasses_do():
    made = [
        mlo.Level("weights", net(0), loss=upper, data=batches(1), optimizer=SGD),
        mlo.Level("model", net(2), loss=fit, data=batches(3), optimizer=SGD, hypergradient="neumann", engine="single"),
    ]
    written = [
        Weights("weights", net(0), data=batches(1), optimizer=SGD),
        Model("model", net(2), data=batches(3), optimizer=SGD, hypergradient=mlo.Neumann(), engine=mlo.Single()),
    ]
    found, expected = mlo.Program(made, engine="single"), mlo.Program(written, engine=mlo.Single())
    assert found.run(4, progress=False).steps == expected.run(4, progress=False).steps
    for name in ("weights", "model"):
        for a, b in zip(found[name].module.parameters(), expected[name].module.parameters(), strict=True):
            assert torch.equal(a, b)
    assert found.levels == made and found["model"] is made[1]
    whole = found.state_dict()
    assert list(whole) == ["weights", "model"]
    assert torch.equal(whole["model"]["weight"], found["model"].module.weight)


def test_state_that_a_function_closes_over_is_put_back_for_every_pass():
    """Also by the pass in which ghost products turn out not to apply: the loss is no plain weighted mean."""

    def counting(seen):
        def loss(batch, weights, model):
            seen["calls"] += 1
            return fit(batch, weights, model) * (1.0 + 0.1 * seen["calls"])

        return loss

    def gradient(level):
        levels = [mlo.Level("weights", net(0), loss=upper, data=batches(1), optimizer=SGD), level]
        return mlo.Program(levels).gradients()["weights"]

    seen = {"calls": 0}
    lower = mlo.Level("model", net(2), loss=counting(seen), data=batches(3), optimizer=SGD)

    class Once(Model):
        def loss(self, batch, weights):
            return super().loss(batch, weights) * 1.1

    found, expected = gradient(lower), gradient(Once("model", net(2), data=batches(3), optimizer=SGD))
    assert seen["calls"] == 1
    assert all(torch.allclose(t, expected[n], rtol=1e-12) for n, t in found.items())


def refused(**options) -> str:
    options = {"loss": fit, "data": batches(0), "optimizer": SGD} | options
    with pytest.raises(ValueError) as error:
        mlo.Level("model", net(0), **options)
    return str(error.value)


def test_wrong_functions_and_names_say_the_way_out():
    with pytest.raises(ValueError, match="its loss reads 'modle', which is no level.*Did you mean 'model'"):
        mlo.Program([mlo.Level("model", net(0), loss=lambda batch, modle: 0, data=batches(0), optimizer=SGD)])
    assert "loss must be a function" in refused(loss="mse")
    assert "Did you mean 'neumann'?" in refused(hypergradient="neuman")
    assert "Penalty(learning_rate=...)" in refused(hypergradient="penalty")
    assert "Did you mean 'fsdp'?" in refused(engine="fspd")
    with pytest.raises(ValueError, match="Model has a loss of its own"):
        Model("model", net(0), loss=fit, data=batches(0), optimizer=SGD)
    with pytest.raises(ValueError, match="Did you mean 'zero3'?"):
        mlo.Program([mlo.Level("model", net(0), loss=lambda model: 0, optimizer=SGD)], engine="zero_3")
    with pytest.raises(KeyError, match="no level 'modle'.*Did you mean 'model'"):
        program()["modle"]
    with pytest.raises(ValueError, match="define loss"):
        mlo.Level("model", net(0), data=batches(0), optimizer=SGD)


def program() -> mlo.Program:
    return mlo.Program(
        [
            mlo.Level("weights", net(0), loss=upper, data=batches(1), optimizer=SGD),
            mlo.Level("model", net(2), loss=fit, data=batches(3), optimizer=SGD, unroll_steps=2),
        ]
    )


def test_what_a_program_and_a_history_look_like():
    made = program()
    lines = repr(made).splitlines()
    assert lines[0] == "Program, after 0 outer iterations, on cpu:"
    assert lines[1].split() == "weights Linear 4 parameters SGD single every 2 steps of model; reads model".split()
    assert lines[2].endswith("reads weights; through it: Identity(mixed='auto')")
    history = made.run(3, progress=False)
    table = history.to_pandas()
    assert list(table.index) == [1, 2, 3] and table["loss/model"].tolist() == history.column("loss/model")
    last = table.iloc[-1]
    losses = f"loss/model {last['loss/model']:.4g}, loss/weights {last['loss/weights']:.4g}"
    assert repr(history) == f"History of 3 outer iterations: {losses}"
    assert {"weights", "model"} <= set(made._ipython_key_completions_())
