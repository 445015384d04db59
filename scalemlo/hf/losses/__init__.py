"""Per-example losses of language models."""
