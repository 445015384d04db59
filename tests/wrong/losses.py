"""Programs whose losses ask, write in place, or weigh by what depends on the lower weights."""

import torch
import torch.nn.functional as F
from torch import nn

import scalemlo as mlo
from tests.wrong.reference import ALONG, Block, Net, case, per_example


# ---- 7. views and weights that answer otherwise ----------------------------------------------------------------------
class Mixture(nn.Module):
    """Above: values by property and list, and weights of examples."""

    def __init__(self):
        super().__init__()
        self.logits, self.decay = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.tensor(-2.0))

    @property
    def temperature(self):
        return self.decay.exp()

    @property
    def weights(self):
        return list(self.logits.sigmoid())

    def forward(self, losses):
        return self.logits.sigmoid()[:, None]


def by_properties(net, top, data):
    losses = per_example(net(data[0]) * top.temperature, data[1])
    return torch.stack([weight * loss for weight, loss in zip(top.weights, losses, strict=True)]).mean()


class Decayed(Net):
    """An L2 term over what is trained, as it is usually written."""

    def size(self):
        return sum(p.square().sum() for p in self.parameters() if p.requires_grad and isinstance(p, nn.Parameter))


def with_decay(net, top, data):
    return per_example(net(data[0]), data[1]).mean() + top.temperature * net.size()


class Asks(Net):
    def forward(self, x):
        x = self.blocks[0](x)
        if x.requires_grad or x.grad_fn is not None or not torch.is_grad_enabled():
            x = x.sin()
        return self.head(self.blocks[1](x) if isinstance(self.head.weight, nn.Parameter) else x)


case("properties and lists of the upper module", Net, Mixture, lower=by_properties, ways=ALONG)
case("weights that are asked whether they are trained", Decayed, Mixture, lower=with_decay, ways=ALONG)
case("branches on what requires a gradient", Asks)


# ---- 8. what once was a traceback ------------------------------------------------------------------------------------
class InPlace(Block):
    def forward(self, x):
        h = self.linear(x)
        h.mul_(0.5).add_(x)
        h[:, 0] = h[:, 1].tanh()
        return F.elu(h, inplace=True)


class Scatters(Net):
    def forward(self, x):
        x = self.blocks[0](x)
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 1] = True
        x = x.masked_scatter(mask.unsqueeze(-1), self.blocks[1](x)[:, :1].tanh())
        return self.head(x)


def scored_by_features(net, top, data):
    """Weights from features that are not detached: they depend on the lower weights too."""
    out = net(data[0])
    return mlo.weighted_mean(per_example(out, data[1]), top(out.flatten(1).mean(1, keepdim=True)).squeeze(-1))


case("operations in place inside of blocks", lambda: Net(InPlace))
case("masked_scatter", Scatters)
case("features that are not detached", Net, lower=scored_by_features, ways=ALONG)
