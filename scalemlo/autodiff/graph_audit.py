"""Reading the graph that autograd has recorded: which operations it has, what it shares, where it mixes examples.

Ghost products are right where the loss of an example depends on no other example. Most models keep examples apart at
every batch; some mix them now and then (mixup with a probability). The graph of a forward pass says so before its
backward: by an operation that moves or sums along the first dimension, or by kinds of operations that no verified pass
had. Walking it takes about a microsecond per node.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .copying import is_of_user


@dataclass(frozen=True)
class GraphAudit:
    """What the graph of a tensor holds.

    Attributes:
        nodes: All of it, the leaves' accumulators included.
        kinds: Names of its operations.
        mixing: The first operation found that mixes the examples of the batch, in words, or None.
        foreign: Names of ``torch.autograd.Function`` s and of compiled or scripted parts.
    """

    nodes: frozenset[Any]
    kinds: frozenset[str]
    mixing: str | None
    foreign: tuple[str, ...] = field(default=())


def audit(x: Tensor, num_examples: int) -> GraphAudit:
    """Walk the graph behind a tensor.

    Args:
        x: A tensor with a graph.
        num_examples: Size of the first dimension of what belongs to examples.

    Returns:
        What was found.
    """
    nodes: set[Any] = set()
    kinds: set[str] = set()
    foreign: set[str] = set()
    mixing = None
    for node in _walk(x.grad_fn, nodes):
        name = node.name()
        if name not in kinds:
            kinds.add(name)
            made = getattr(type(node), "_forward_cls", None)
            if made is not None and is_of_user(made):
                foreign.add(f"{made.__module__}.{made.__qualname__}")
            elif "DifferentiableGraph" in name:
                foreign.add("a torch.jit.script function")
        if mixing is None:
            mixes = _MIXING.get(name)
            if mixes is not None and mixes(node, num_examples):
                mixing = name.rstrip("0123456789").removesuffix("Backward").lower()
    return GraphAudit(frozenset(nodes), frozenset(kinds), mixing, tuple(sorted(foreign)))


def nodes_of(x: Tensor) -> set[Any]:
    """All nodes of the graph behind a tensor."""
    found: set[Any] = set()
    for _ in _walk(x.grad_fn, found):
        pass
    return found


def shares_nodes(x: Tensor, nodes: Collection[Any]) -> bool:
    """Whether the graph behind a tensor has a node among some others: a computation or a leaf in common."""
    return any(node in nodes for node in _walk(x.grad_fn, set()))


def _walk(start: Any, seen: set[Any]) -> Iterator[Any]:
    pending = [start]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


# ---- operations along the first dimension ----------------------------------------------------------------------------
def _sizes(node: Any) -> tuple[int, ...]:
    for name in ("_saved_self_sym_sizes", "_saved_self", "_saved_result", "_saved_input"):
        found = getattr(node, name, None)
        if isinstance(found, Tensor):
            return tuple(found.shape)
        if found is not None:
            return tuple(found)
    outputs = node._input_metadata  # what the operation has made; of its inputs nothing is known
    return tuple(outputs[0].shape) if outputs else ()


def _along_first(node: Any, num_examples: int) -> bool:
    sizes = _sizes(node)
    if not sizes or sizes[0] != num_examples or num_examples == 1:
        return False
    dims = getattr(node, "_saved_dims", None)
    if dims is None:
        dims = getattr(node, "_saved_dim", None)
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    return 0 in {d % len(sizes) if d < 2**62 else d - 2**64 + len(sizes) for d in dims}


def _reorders(index: Tensor | None, num_examples: int) -> bool:
    """Whether an index of the first dimension puts other examples in an example's place."""
    if index is None or index.dim() != 1 or len(index) != num_examples or num_examples == 1:
        return False
    return not bool((index == torch.arange(num_examples, device=index.device)).all())


def _by_index(node: Any, num_examples: int) -> bool:
    sizes, indices = _sizes(node), node._saved_indices
    return bool(sizes) and sizes[0] == num_examples and bool(indices) and _reorders(indices[0], num_examples)


def _by_selection(node: Any, num_examples: int) -> bool:
    sizes = _sizes(node)
    return node._saved_dim == 0 and sizes[0] == num_examples and _reorders(node._saved_index, num_examples)


def _by_product(node: Any, num_examples: int) -> bool:
    """Similarities of all examples with all others."""
    if node._saved_self_sym_sizes[0] != num_examples or node._saved_mat2_sym_sizes[1] != num_examples:
        return False
    following = node.next_functions[1][0]
    while following is not None and following.name() in ("TBackward0", "TransposeBackward0", "ToCopyBackward0"):
        following = following.next_functions[0][0]
    return num_examples > 1 and following is not None and not following.name().endswith("AccumulateGrad")


def _in_training(node: Any, num_examples: int) -> bool:
    return bool(node._saved_training) and node._saved_input.shape[0] > 1  # of instance norms it is 1


_MIXING = {
    **dict.fromkeys(
        ("FlipBackward0", "RollBackward0", "SumBackward1", "MeanBackward1", "SoftmaxBackward0", "LogSoftmaxBackward0")
        + ("CumsumBackward0", "SortBackward0", "TopkBackward0", "LinalgVectorNormBackward0", "StdBackward0")
        + ("VarBackward0", "MaxBackward0", "MinBackward0", "AmaxBackward0", "AminBackward0", "LogsumexpBackward0")
        + ("GatherBackward0", "CumprodBackward0", "ProdBackward1"),
        _along_first,
    ),
    "IndexBackward0": _by_index,
    "IndexSelectBackward0": _by_selection,
    "MmBackward0": _by_product,
    "NativeBatchNormBackward0": _in_training,
    "CudnnBatchNormBackward0": _in_training,
}
"""What says whether a node mixes examples, by the node's name."""
