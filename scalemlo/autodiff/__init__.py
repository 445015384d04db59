"""Derivatives of sharded modules that no training framework computes."""
