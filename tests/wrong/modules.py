"""Programs whose modules refer to themselves, change gradients, or ask their weights what they are."""

import functools
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import scalemlo as mlo
from tests.wrong.reference import FIRST, Block, Net, case, per_example


# ---- 3. a copy that still holds the live module ----------------------------------------------------------------------
class Closures(Net):
    """References to itself in a lambda, a partial, a weak reference and a hook with an adapter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.adapter = nn.Linear(5, 5)
        self.activation = lambda x: (x * self.scale).tanh()
        self.bound = functools.partial(Closures.scaled, self)
        self.parent = weakref.ref(self)
        self.blocks[0].register_forward_hook(lambda m, args, out: out + self.adapter(args[0]))

    def scaled(self, x):
        return x * self.scale.exp()

    def forward(self, x):
        return super().forward(self.parent().activation(self.bound(x)))


class Properties(Net):
    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(5))

    @property
    def scale(self):
        return self.raw.exp() + self.blocks[0].linear.weight.sum(0)

    def forward(self, x):
        return super().forward(x * self.scale)


def normed_block() -> nn.Module:
    block = Block()
    block.linear = torch.nn.utils.weight_norm(block.linear)
    return block


def parametrized_block() -> nn.Module:
    block = Block()
    block.linear = torch.nn.utils.parametrizations.weight_norm(block.linear)
    return block


class Shared(nn.Module):
    """A block that holds its parent in a closure, and parts of another block."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(5, 1)
        self.blocks[1].linear.weight = self.blocks[0].linear.weight
        self.blocks[1].project = self.head

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[1].project(x)


case("lambdas, partials, weak references and hooks", Closures)
case("properties computed from weights", Properties)
case("weight_norm of old", lambda: Net(normed_block))
case("weight_norm by parametrization", lambda: Net(parametrized_block))
case("modules and weights that blocks share", Shared)


# ---- 4. a derivative of the loss that is not that of the update ------------------------------------------------------
class Tied(nn.Module):
    """The row of padding is in the text, and in the output layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(6, 5, padding_idx=1), nn.ModuleList([Block()])
        with torch.no_grad():
            self.embed.weight[1] += 0.3

    def forward(self, x):
        ids = (x.abs() * 4).long().sum(-1) % 6
        return F.linear(self.blocks[0](self.embed(ids)), self.embed.weight)


class ScaledByFrequency(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(6, 5, scale_grad_by_freq=True), nn.ModuleList([Block()])

    def forward(self, x):
        return self.blocks[0](self.embed((x.abs() * 4).long().sum(-1) % 6))


class StopsInOldWays(Net):
    def forward(self, x):
        shifted = self.head(x).exp()
        shifted.detach_()
        out = super().forward(x) * shifted
        return out + self.blocks[0].linear.weight.data.sum() * self.head.bias


def weights_of_data(net, top, data):
    losses = per_example(net(data[0]), data[1])
    return mlo.weighted_mean(losses, top(losses.data.unsqueeze(-1)).squeeze(-1))


class WritesUnderNoGrad(Net):
    def forward(self, x):
        x = self.blocks[0](x)
        with torch.no_grad():
            scale = x.abs().amax((1, 2), keepdim=True)
            held = torch.empty_like(scale)
            held.copy_(scale)
        return self.head(self.blocks[1](x / held))


def masked() -> nn.Module:
    net = Net()
    mask = torch.zeros(5, 5)
    mask[1:3] = 1.0
    net.blocks[0].linear.weight.register_hook(lambda gradient: gradient * mask.to(gradient))
    return net


class ReversedFeatures(Net):
    """A gradient reversal layer, by a hook on an activation."""

    def forward(self, x):
        x = self.blocks[0](x)
        side = x.tanh()
        if side.requires_grad:
            side.register_hook(lambda gradient: -0.5 * gradient)
        return self.head(self.blocks[1](x) + side)


case("padding that is in the text, tied", Tied)
case("gradients scaled by frequency", ScaledByFrequency)
case("data and detach_", StopsInOldWays, ways=FIRST)
case("weights from data of losses", Net, lower=weights_of_data, ways=FIRST)
case("values written under no_grad", WritesUnderNoGrad, ways=FIRST)
case("a hook that masks a weight's gradient", masked)
case("a hook on an activation", ReversedFeatures)
