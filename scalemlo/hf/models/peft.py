"""Adapters whose parameters are divided between two levels: PEFT's, with gates, orthogonality terms and conversions.

What PEFT calls them: ``lora_A`` and ``lora_B`` (factors), ``lora_magnitude_vector`` (DoRA), ``lora_E`` (AdaLoRA's
singular values; here also gates, see :class:`GatedLinear`), ``modules_to_save`` (a head that is trained whole).
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.lora import LoraLayer
from peft.utils import transpose
from torch import Tensor, nn

from ...engines.units import find_units
from .models import LoraSpec

ADAPTER = "default"
"""Name of the one adapter."""


class GatedLinear(SVDLinear):
    """A linear layer with a low-rank update whose components have gates that sum to one.

    ``y = W0 x + alpha B diag(softmax(e)) A x``, with ``lora_A`` A ``[r, in]``, ``lora_B`` B ``[out, r]`` and ``lora_E``
    e ``[r, 1]``. At e = 0 every gate is 1/r, and the layer is LoRA's with its factor alpha / r. PEFT's own layer
    multiplies with e itself, which starts at zero: nothing reaches A and B until it has moved.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def gates(self) -> Tensor:
        """``softmax(e)``, ``[r, 1]``."""
        return self.lora_E[ADAPTER].softmax(dim=0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``alpha B diag(softmax(e)) A``, laid out like the frozen weight."""
        update = self.lora_B[adapter] @ (self.lora_A[adapter] * self.gates())
        return transpose(update, self.fan_in_fan_out) * self.scaling[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the frozen layer and add the update, computed in the precision of the factors."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        inputs = self.lora_dropout[ADAPTER](x.to(a.dtype))
        return result + (self.scaling[ADAPTER] * (inputs @ (a * self.gates()).T @ b.T)).to(result.dtype)


def _lora(spec: LoraSpec, **options: Any) -> LoraConfig:
    return LoraConfig(r=spec.r, **options)


def _adalora(spec: LoraSpec, **options: Any) -> AdaLoraConfig:
    # Levels decide what is trained: AdaLoRA's own schedule, which prunes ranks after backward passes, never runs.
    return AdaLoraConfig(init_r=spec.r, target_r=spec.r, total_step=1, **options)


KINDS: dict[str, Callable[..., Any]] = {
    "lora": _lora,
    "dora": partial(_lora, use_dora=True),
    "adalora": _adalora,
    "gated": _adalora,
}
"""PEFT configuration by kind of adapter."""


def add_adapters(
    model: nn.Module,
    spec: LoraSpec,
    kind: str = "lora",
    *,
    task_type: str | None = None,
    ranks: Mapping[str, int] | None = None,
) -> PeftModel:
    """Freeze a model and give its linear layers adapters in fp32 (fp64 on a model in fp64).

    Args:
        model: Loaded in fp32, or, as the base stays frozen, in bf16.
        spec: Rank, scale, dropout and layers.
        kind: One of :data:`KINDS`. ``gated`` starts at the pretrained model: A as LoRA's, B and e zero.
        task_type: PEFT's; ``SEQ_CLS`` also trains the head.
        ranks: Rank by name of a layer, where it is not ``spec.r``; for ``lora`` and ``dora``. The factor alpha / r
            that scales the update stays that of ``spec``.

    Returns:
        The model with adapters.

    Raises:
        ValueError: If the kind is unknown, or ``ranks`` are given to a kind that has none.
    """
    if kind not in KINDS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(KINDS)}")
    if ranks and KINDS[kind] is _adalora:
        raise ValueError(f"ranks ({len(ranks)} of them) need kind 'lora' or 'dora', not {kind!r}")
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    options: dict[str, Any] = dict(
        lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type=task_type
    )
    if ranks:
        options["rank_pattern"] = dict(ranks)
        options["alpha_pattern"] = {name: spec.alpha * rank / spec.r for name, rank in ranks.items()}
    # Ranks draw the same adapters, whatever was drawn before, and the caller's stream is untouched.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*init_r.*target_r.*")
        torch.manual_seed(spec.seed)
        adapted = cast(PeftModel, get_peft_model(cast(Any, model), KINDS[kind](spec, **options)))
        for layer in adapted_layers(adapted).values():
            if isinstance(layer, AdaLoraLayer):
                layer.ranknum.requires_grad_(False)  # a number, which peft 0.21 leaves trainable
        if kind == "gated":
            _gate(adapted)
    return adapted


def _gate(model: PeftModel) -> None:
    for name, layer in adapted_layers(model).items():
        if type(layer) is not SVDLinear:
            raise ValueError(f"{name} is a {type(layer).__name__}; gates need torch.nn.Linear or GPT-2's Conv1D layers")
        layer.__class__ = GatedLinear
        nn.init.kaiming_uniform_(layer.lora_A[ADAPTER], a=5**0.5)
        nn.init.zeros_(layer.lora_B[ADAPTER])


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Layers with adapters, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}


# ---- orthogonality ---------------------------------------------------------------------------------------------------
def direction_orthogonality(layer: LoraLayer) -> Tensor:
    """How far DoRA's directions are from orthogonal: ``|D D^T - I|_F``, the rows of D those of W0 + s B A normalised.

    The norm is differentiated here; in DoRA's forward it is a constant. BiDoRA (arXiv:2410.09758) calls it Gram
    regularisation. Costs a product ``[out, in] x [in, out]`` per layer.
    """
    a: Any = layer.lora_A[ADAPTER].weight  # [r, in]
    b: Any = layer.lora_B[ADAPTER].weight  # [out, r]
    frozen: Any = layer.get_base_layer().weight
    weight = transpose(frozen, getattr(layer, "fan_in_fan_out", False)).to(a.dtype)
    direction = nn.functional.normalize(weight + layer.scaling[ADAPTER] * (b @ a), dim=1)  # [out, in]
    return torch.linalg.norm(direction @ direction.T - _identity(direction))


def factor_orthogonality(layer: AdaLoraLayer) -> Tensor:
    """How far singular vectors P = ``lora_B``, Q = ``lora_A`` are from it: ``|P^T P - I|_F^2 + |Q Q^T - I|_F^2``."""
    p: Any = layer.lora_B[ADAPTER].T  # [r, out]
    q: Any = layer.lora_A[ADAPTER]  # [r, in]
    return sum(((f @ f.T - _identity(f)).square().sum() for f in (p, q)), start=q.new_zeros(()))


def _identity(rows: Tensor) -> Tensor:
    return torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)


class _Block(nn.Module):
    """Mixed into a block: called with ``orthogonality=True``, it gives the sum of a term over its adapters.

    Sharded weights are whole only while their block runs, so the term must be computed by a call of the block.
    """

    _term: Callable[[Any], Tensor]

    def forward(self, *args: Any, orthogonality: bool = False, **kwargs: Any) -> Any:
        if not orthogonality:
            return super().forward(*args, **kwargs)
        layers = adapted_layers(self).values()
        return torch.stack([self._term(layer) for layer in layers]).sum()


class _Model(nn.Module):
    """Mixed into the model."""

    _term: Callable[[Any], Tensor]
    _blocks: tuple[str, ...]

    def orthogonality(self) -> Tensor:
        """Mean of the term over all adapters."""
        layers, found = adapted_layers(self), []
        for name in self._blocks:
            found.append(self.get_submodule(name)(orthogonality=True))
        inside = tuple(f"{name}." for name in self._blocks)
        found += [self._term(layer) for name, layer in layers.items() if not name.startswith(inside)]
        return torch.stack(found).sum() / len(layers)


def add_orthogonality(model: PeftModel, term: Callable[[Any], Tensor]) -> PeftModel:
    """Give a model with adapters a method ``orthogonality()``, for a level's loss to call; right on every engine.

    Args:
        model: Changed in place, before an engine takes it.
        term: Of one adapted layer: :func:`direction_orthogonality` or :func:`factor_orthogonality`.

    Returns:
        The model.
    """
    blocks = [n for n in find_units(model, None, "adapters") if adapted_layers(model.get_submodule(n))]
    for name in blocks:
        _mix_in(model.get_submodule(name), _Block, _term=staticmethod(term))
    _mix_in(model, _Model, _term=staticmethod(term), _blocks=tuple(blocks))
    return model


def _mix_in(module: nn.Module, mixin: type, **attributes: Any) -> None:
    cls = type(module)  # the name stays: units are found by it
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, **attributes})


# ---- conversions -----------------------------------------------------------------------------------------------------
def chosen_ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of gates of at least 1/r, by name of the layer; at least one is, since they sum to one.

    Args:
        state: Tensors of a model with ``gated`` adapters.

    Returns:
        Ranks for :func:`add_adapters`.
    """
    suffix, prefix = f".lora_E.{ADAPTER}", "base_model.model."
    ranks = {}
    for name, e in state.items():
        if name.endswith(suffix):
            # Equal gates are 1/r up to rounding.
            ranks[name.removesuffix(suffix).removeprefix(prefix)] = int((e.softmax(0) * len(e) >= 1 - 1e-6).sum())
    return ranks


def gated_to_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA adapter that computes the same as ``gated`` adapters: B becomes ``r B diag(softmax(e))``.

    Args:
        state: Trainable tensors of a model with ``gated`` adapters.

    Returns:
        Trainable tensors of the same model with ``lora`` adapters of the same spec.
    """
    converted = {}
    for name, t in state.items():
        if name.endswith(f".lora_A.{ADAPTER}"):
            converted[f"{name}.weight"] = t
        elif name.endswith(f".lora_B.{ADAPTER}"):
            e = state[name.replace(".lora_B.", ".lora_E.")]
            converted[f"{name}.weight"] = t * (len(e) * e.softmax(0)).T
        elif f".lora_E.{ADAPTER}" not in name:
            converted[name] = t
    return converted
