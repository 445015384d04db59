"""Per-example losses of language models."""

from .next_token import example_losses

__all__ = ["example_losses"]
