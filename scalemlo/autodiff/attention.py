"""Attention of skeletons in chunks of queries, so that second derivatives of long sequences fit.

Attention that has second derivatives is written out: scores ``[B, H, T, T]``, softmax, product. Differentiated twice
it keeps several tensors of that shape, with tangents, alive at once; the memory of a Hessian-vector product would grow
with T^2. Rows of the softmax do not depend on each other: here ``QUERY_CHUNK`` of them are computed at a time and
rematerialised, so that the peak grows with ``QUERY_CHUNK * T``, as in Rabe and Staats, "Self-attention does not need
O(n^2) memory" (arXiv:2112.05682), section 2, with chunks of queries alone.

Each chunk runs what the live module would run on all queries: transformers' ``sdpa`` (in torch's own operations, see
:mod:`.derivatives.products`), or the ``eager`` function of the model's own file, soft caps included. A mask stays
whole, without heads: one byte per pair with ``sdpa``, none where it is causal and nobody is padded.
"""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .chunks import inside_grad
from .remat import remat

QUERY_CHUNK = 512
"""Queries at a time; shorter sequences are computed at once, as without this file."""

NAMES = {"sdpa": "scalemlo_chunked_sdpa", "eager": "scalemlo_chunked_eager"}
"""Implementations of transformers, and the name under which each is registered in chunks."""


def chunked_name(model: nn.Module, implementation: str) -> str:
    """Register the chunked form of an implementation, and say whether a model may use it.

    Args:
        model: A model of transformers.
        implementation: ``"sdpa"`` or ``"eager"``.

    Returns:
        The name to put in its config; the implementation itself if the model's attention does not go through
        transformers' interface, or if its code asks for the implementation by name.
    """
    file = sys.modules.get(type(model).__module__)
    if file is None or not hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
        return implementation
    if implementation == "eager" and not hasattr(file, "eager_attention_forward"):
        return implementation
    asked = re.findall(r"_attn_implementation (?:==|!=|in|not in) .*", inspect.getsource(file))
    if any(f'"{implementation}"' in line for line in asked):
        return implementation
    _register()
    return NAMES[implementation]


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAMES["sdpa"], chunked_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES["sdpa"], sdpa_mask)
    ALL_ATTENTION_FUNCTIONS.register(NAMES["eager"], chunked_eager)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES["eager"], _eager_mask)


def chunked_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa`` attention in chunks of queries.

    Args:
        module: The attention layer.
        query: ``[B, H, T, D]``.
        key: ``[B, H', S, D]``, with H a multiple of H'.
        value: ``[B, H', S, D']``.
        attention_mask: Broadcasts to ``[B, H, T, S]``: True, or 0 added to the scores, where a key is seen.
        **kwargs: As transformers calls it (``scaling``, ``dropout``, ``is_causal``, ...).

    Returns:
        ``[B, T, H, D']`` and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend = partial(sdpa_attention_forward, module)
    if not _in_chunks((query, key, value), kwargs):
        return attend(query, key, value, attention_mask, **kwargs)
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    kwargs["is_causal"] = False  # of a chunk: its mask says all
    return _attend_in_chunks(partial(attend, **kwargs), query, key, value, attention_mask, causal), None


def chunked_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The ``eager`` attention of the layer's own file in chunks of queries.

    Args:
        module: The attention layer.
        query: ``[B, H, T, D]``.
        key: ``[B, H', S, D]``.
        value: ``[B, H', S, D']``.
        attention_mask: Added to the scores, broadcasts to ``[B, H, T, S]``; None where every query sees every key.
        **kwargs: As transformers calls it (``scaling``, ``dropout``, ``softcap``, ...).

    Returns:
        ``[B, T, H, D']``, and the attention weights where there was no need of chunks, else None.
    """
    attend = partial(sys.modules[type(module).forward.__module__].eager_attention_forward, module)
    holds_parameters = any(p is not None for p in module._parameters.values())  # attention sinks, read by eager code
    if holds_parameters or not _in_chunks((query, key, value), kwargs):
        return attend(query, key, value, attention_mask, **kwargs)
    return _attend_in_chunks(partial(attend, **kwargs), query, key, value, attention_mask, causal=False), None


def _in_chunks(qkv: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether chunks are of use, and their results those of the whole."""
    if qkv[0].shape[2] <= QUERY_CHUNK:
        return False
    if torch.is_grad_enabled() and not inside_grad() and any(x.requires_grad for x in qkv):
        return False  # a graph that is kept keeps all chunks
    if kwargs.get("dropout"):  # chunks would draw other masks than the training step that is differentiated
        return False
    others = [x for x in kwargs.values() if isinstance(x, Tensor) and (x.is_floating_point() or x.dtype == torch.bool)]
    return not others and kwargs.get("cache") is None and not kwargs.get("output_attentions")


def _attend_in_chunks(
    attend: Callable[..., tuple[Tensor, Any]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    def rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, mask)[0]

    run = remat if inside_grad() else _call
    outputs, start = [], 0
    for chunk in query.split(QUERY_CHUNK, dim=2):  # split: its adjoint is one concatenation
        stop = start + chunk.shape[2]
        if mask is None and causal:  # keys behind the last query are seen by nobody
            seen = min(stop, key.shape[2])
            ones = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device)
            outputs.append(run(rows, chunk, key[:, :, :seen], value[:, :, :seen], ones.tril(start)[None, None]))
        else:
            own = mask[:, :, start:stop] if mask is not None and mask.shape[2] > 1 else mask
            outputs.append(run(rows, chunk, key, value, own))
        start = stop
    return torch.cat(outputs, dim=1)


def _call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """Transformers' ``eager_mask``, made once for all examples where it is the same for all."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))
    if mask is None:
        return None
    own = mask[:1] if mask.stride(0) == 0 else mask
    added = torch.where(own, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)
    return added.expand(mask.shape)
