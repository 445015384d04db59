"""What has no exact derivative is refused by a sentence, and the ways out that it names are ways out."""

import re

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import scalemlo as mlo
from tests.wrong.reference import (
    ESTIMATORS,
    Case,
    Net,
    compare,
    per_example,
    program_of,
    squared,
    weight_net,
    weighted,
    weighted_losses,
)


class Cubed(torch.autograd.Function):
    """Of the old form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


@torch.library.custom_op("scalemlo_tests::squared", mutates_args=())
def custom_square(x: Tensor) -> Tensor:
    return x * x


custom_square.register_autograd(
    lambda ctx, gradient: 2 * gradient * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.tanh() * x.sin()


class Applies(Net):
    def forward(self, x):
        return super().forward(Cubed.apply(self.head.weight) + x)


class RunsCustomOp(Net):
    def forward(self, x):
        return super().forward(x) + custom_square(self.head(x))


class RunsScript(Net):
    def forward(self, x):
        return super().forward(x) + scripted(self.head(x))


class Checkpointed(Net):
    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def with_module_hooks() -> nn.Module:
    net = Net()
    net.blocks[1].register_full_backward_hook(lambda m, into, out: (into[0] * 0.3,))
    return net


def with_inner_gradient(net, top, data):
    x = data[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return weighted_losses(per_example(net(data[0]), data[1]) + slope.square().flatten(1).sum(1), top, data[1])


REFUSED = {
    "an autograd.Function of old": (Applies, weighted, "torch.autograd.Function.*setup_context.*Cubed"),
    "a custom operator": (RunsCustomOp, weighted, "operator.*setup_context.*custom_square, a custom operator"),
    "a function of torch.jit.script": (RunsScript, weighted, "torch.jit.script"),
    "torch.utils.checkpoint": (Checkpointed, weighted, "torch.utils.checkpoint"),
    "a backward hook on a module": (with_module_hooks, weighted, "backward hook on blocks.1"),
    "a gradient inside the loss": (Net, with_inner_gradient, r"grad\(\) itself.*torch.func.grad"),
}
WAYS_OUT = {
    "finite differences": mlo.Identity(mixed="finite_difference"),
    "Penalty": mlo.Penalty(learning_rate=0.1),
    "PBGDFree": mlo.PBGDFree(),
}


DIFFERENCES = [name for name in REFUSED if name not in ("a gradient inside the loss", "a backward hook on a module")]
"""Of outputs of the module: they see no hook, and no loss beside it."""


def of_refused(name: str) -> Case:
    def make() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return net().double(), weight_net().double()

    net, lower, _ = REFUSED[name]
    return Case(make, lower, squared)


@pytest.mark.parametrize("way", ["forward derivative", "Neumann, remat", "Neumann, retain", "unrolled"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_or_right(name, way):
    message = REFUSED[name][2]
    try:
        found, expected = compare(of_refused(name), ESTIMATORS[way])
    except mlo.DerivativeError as error:
        assert re.search(message, str(error), re.S), str(error)
    else:
        assert found == pytest.approx(expected, rel=2e-6)


def skip_what_only_newer_torch_can(name: str) -> None:
    if name == "torch.utils.checkpoint" and torch.__version__ < (2, 12):
        pytest.skip("before torch 2.12 a recomputed block finds no weights, and an error says so")


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("name", REFUSED)
def test_first_derivatives_are_a_way_out(name, way):
    if way == "finite differences" and name not in DIFFERENCES:
        return
    if way != "PBGDFree":
        skip_what_only_newer_torch_can(name)
    torch.manual_seed(0)
    program = program_of(of_refused(name), WAYS_OUT[way], has_direct_part=way == "PBGDFree")
    record = program.run(2, progress=False).steps[-1]
    assert record["gradient_norm/top"] > 0


@pytest.mark.parametrize("name", DIFFERENCES)
def test_finite_differences_are_right_there(name):
    skip_what_only_newer_torch_can(name)
    found, expected = compare(of_refused(name), WAYS_OUT["finite differences"])
    assert found == pytest.approx(expected, rel=1e-4)
