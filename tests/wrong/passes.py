"""Programs whose blocks leave values behind, or run again in another state."""

import random
import types
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.wrong.reference import FIRST, Block, Net, case, per_example, weighted_losses


# ---- 1. values that leave or enter a block otherwise than by arguments and results -----------------------------------
class LeavesLoss(Block):
    def forward(self, x):
        out = super().forward(x)
        self.auxiliary = (out * self.linear.bias).mean((1, 2))  # [B]
        return out


class LeavesAll(Net):
    """What blocks leave behind is put into the result by the parent."""

    def __init__(self):
        super().__init__(LeavesLoss)

    def forward(self, x):
        return super().forward(x) + sum(block.auxiliary for block in self.blocks)[:, None, None]


class Captured(Net):
    """Features by forward hooks on what stands inside the blocks."""

    def forward(self, x):
        found = []
        handles = [b.linear.register_forward_hook(lambda m, args, out: found.append(out)) for b in self.blocks]
        try:
            out = super().forward(x)
        finally:
            for handle in handles:
                handle.remove()
        return out + sum(feature.sin().mean(-1, keepdim=True) for feature in found)


class Appends(Block):
    def forward(self, x, found, by_name):
        out = super().forward(x)
        found.append(out.cos())
        by_name["last"] = out.sin()
        return out


class Gathers(Net):
    def __init__(self):
        super().__init__(Appends)

    def forward(self, x):
        found: list[Tensor] = []
        by_name: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, found, by_name)
        return self.head(x) + (sum(found) + by_name["last"]).mean(-1, keepdim=True)


@dataclass
class Output:
    hidden: Tensor
    extra: dict


class ReturnsObject(Block):
    def forward(self, x):
        return Output(super().forward(x), {"norm": types.SimpleNamespace(value=self.linear(x).square())})


class Objects(Net):
    def __init__(self):
        super().__init__(ReturnsObject)

    def forward(self, x):
        norms = 0.0
        for block in self.blocks:
            out = block(x)
            x, norms = out.hidden, norms + out.extra["norm"].value
        return self.head(x) + norms.mean(-1, keepdim=True)


class Modulated(Block):
    scale: Tensor

    def forward(self, x):
        return x + self.scale * self.linear(x).tanh()


class FiLM(Net):
    """The parent puts tensors into attributes of its blocks."""

    def __init__(self):
        super().__init__(Modulated)
        self.scales = nn.Linear(5, 5)

    def forward(self, x):
        scale = self.scales(x.mean(1, keepdim=True)).exp()
        for block in self.blocks:
            block.scale = scale
        return super().forward(x)


class Rotates(Block):
    def forward(self, x):
        z = torch.complex(self.linear(x), x)
        return (z * torch.exp(1j * z.real)).imag + x


case("attributes that the parent reads", LeavesAll)
case("hooks inside of blocks", Captured)
case("lists and dicts that are appended to", Gathers)
case("dataclasses and other objects", Objects)
case("attributes that the parent sets", FiLM)
case("complex activations", lambda: Net(Rotates))


# ---- 2. a pass that runs again in another state ----------------------------------------------------------------------
class Drops(Block):
    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(3)

    def forward(self, x):
        return super().forward(self.dropout(self.norm(x)))


def in_both_modes(net, top, data):
    noisy = net(data[0])
    net.eval()
    clean = net(data[0])
    net.train()
    return weighted_losses((noisy - clean).square().flatten(1).mean(1) + per_example(clean, data[1]), top, data[1])


class Switched(Block):
    """An adapter that is on or off."""

    def __init__(self):
        super().__init__()
        self.adapter, self.is_on = nn.Linear(5, 5), False

    def forward(self, x):
        return super().forward(x) + (self.adapter(x) if self.is_on else 0.0)


class Switches(Net):
    def __init__(self):
        super().__init__(Switched)

    def both(self, x):
        outs = []
        for is_on in (True, False):
            for block in self.blocks:
                block.is_on = is_on
            outs.append(self(x))
        return outs


def between_adapters(net, top, data):
    on, off = net.both(data[0])
    return weighted_losses((on - off).square().flatten(1).mean(1) + per_example(on, data[1]), top, data[1])


class Annealed(Block):
    """Its temperature falls with every call; a moving average of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(5))
        self.temperature = 1.0

    def forward(self, x):
        if self.training:
            self.temperature *= 0.8
            with torch.no_grad():
                self.average += 0.5 * (x.detach().mean((0, 1)) - self.average)
        return x + (self.linear(x - self.average) / self.temperature).tanh()


def drawing(net, top, data):
    losses = per_example(net(data[0] * random.uniform(0.5, 1.5)), data[1] * np.random.rand())
    return weighted_losses(losses, top, data[1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(6, 2, 7, dropout=0.2, batch_first=True)])
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.blocks[0](self.embed(x)))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2)])
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = x[:, None].contiguous(memory_format=torch.channels_last)
        x = self.dropout(self.blocks[0](x).tanh().contiguous(memory_format=torch.channels_last))
        return self.blocks[1](x)


case("train mode, then evaluation mode", lambda: Net(Drops), lower=in_both_modes, ways=FIRST)
case("an adapter switched within the module", Switches, lower=between_adapters)
case("an annealed temperature and a moving average", lambda: Net(Annealed), ways=FIRST)
case("a loss that draws from Python and numpy", Net, lower=drawing)
case("masks of an encoder layer", Encoder)
case("masks of channels_last", ChannelsLast)
