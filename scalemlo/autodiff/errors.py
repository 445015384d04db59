"""What to tell a user whose loss cannot be differentiated the way it was asked for."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class DerivativeError(RuntimeError):
    """A derivative cannot be taken the way it was asked for; says which operation and the way out."""


_FIRST_ORDER = (
    "mixed='ghost' needs none of it where the loss is one weighted_mean; mixed='finite_difference' and Penalty() take "
    "values and first derivatives alone"
)

_EXPLANATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("setup_context staticmethod",),
        "the loss runs a torch.autograd.Function, or an operator made of one, that is written in the old form: exact "
        "derivatives run through torch.func, which needs forward(...) without ctx, setup_context and jvp "
        f"(https://pytorch.org/docs/stable/notes/extending.func.html). Write it so; or {_FIRST_ORDER}.",
    ),
    (
        ("implement the jvp function", "jvp is not implemented"),
        "the loss runs a torch.autograd.Function without a forward derivative. Give it a staticmethod jvp; or "
        f"{_FIRST_ORDER}.",
    ),
    (
        ("saved tensor hooks",),
        "the loss uses torch.utils.checkpoint, or other hooks on saved tensors, itself, which torch.func does not "
        "take. Switch it off: exact derivatives run every block again anyway. With models of transformers, "
        "gradient_checkpointing_enable() is fine as it is.",
    ),
    (
        ("once_differentiable",),
        "the loss runs an operation whose gradient cannot be differentiated (once_differentiable). Use another "
        f"implementation of it; or {_FIRST_ORDER}.",
    ),
    (
        ("modified by an inplace operation", "used in an in-place operation", "mutate a captured Tensor"),
        "the loss writes in place into a tensor that a derivative still needs: {message} Write out of place there "
        "(x = x + y, relu(x), not x += y, relu_(x)).",
    ),
    (
        ("a second time",),
        "a part of the graph belongs to two backward passes: something computed in an earlier pass, or for another "
        "level, is used again. Compute it anew in each loss, or detach it.",
    ),
    (
        ("forward AD", "forward-mode", "forward mode AD"),
        "an operation of the lower level has no forward derivative: {message} Use another implementation of it, "
        f"in torch's elementary operations (attn_implementation='eager' for attention); or {_FIRST_ORDER}.",
    ),
    (
        ("derivative for",),
        "an operation of the lower level has no second derivative: {message}. Use another implementation of it, "
        f"in torch's elementary operations (attn_implementation='eager' for attention); or {_FIRST_ORDER}.",
    ),
    (
        ("SparseCPU", "SparseCUDA", "sparse tensor", "Sparse"),
        "a sparse tensor takes part in the loss: {message} Use dense ones (nn.Embedding(sparse=False)).",
    ),
    (
        ("meta",),
        "a weight was used outside the forward of the module that holds it ({message}). Call the module, not its "
        "submodules or weights, in the loss; or name the block that uses it in FSDP(units=...).",
    ),
)
"""Parts of torch's messages, and what they mean here; the first that fits counts."""


@contextmanager
def explained(suspects: Iterable[str] = ()) -> Iterator[None]:
    """Turn torch's errors about missing derivatives into :class:`DerivativeError` with the way out.

    Args:
        suspects: What the modules of the loss use that may be behind it, in words.

    Raises:
        DerivativeError: In the place of an error that is recognised.
        OutOfMemoryError: As it is, whatever it says.
        RuntimeError: Any other, as it is.
    """
    try:
        yield
    except (DerivativeError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        for parts, explanation in _EXPLANATIONS:
            if any(part in message for part in parts):
                known = list(suspects)
                named = f" The module uses {', '.join(known[:3])}." if known else ""
                first = message.split("\n")[0].rstrip()
                raise DerivativeError(explanation.replace("{message}", first) + _place(error) + named) from error
        raise


def _place(error: BaseException) -> str:
    """The line of the model's or the user's code that an error came from; empty where it is not in the traceback."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("torch", "scalemlo"):
            found = f" It came from {frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}."
    return found
