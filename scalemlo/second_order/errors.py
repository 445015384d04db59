"""What to tell a user whose loss cannot be differentiated the way it was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager


class DerivativeError(RuntimeError):
    """A derivative cannot be taken the way it was asked for; says which operation and the way out."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors about missing derivatives into :class:`DerivativeError` with the way out.

    Raises:
        DerivativeError: In the place of an error that is recognised.
        RuntimeError: Any other, as it is.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        if "forward AD" in message or "forward-mode" in message:
            raise DerivativeError(
                f"an operation of the lower level has no forward derivative: {message} Use another implementation of "
                "it (attn_implementation='eager' for attention), or mixed='finite_difference' in the hypergradient."
            ) from error
        if "derivative for" in message and "is not implemented" in message:
            raise DerivativeError(
                f"an operation of the lower level has no second derivative: {message}. Use another implementation of "
                "it (attn_implementation='eager' for attention)."
            ) from error
        if "meta" in message:
            raise DerivativeError(
                f"a weight was used outside the forward of the module that holds it ({message}). Call the module, "
                "not its submodules or weights, in the loss; or name the block that uses it in FSDP(units=...)."
            ) from error
        raise
