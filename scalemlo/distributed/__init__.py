"""Ranks: the process group, what they do together, vectors in shards, and who hangs."""
