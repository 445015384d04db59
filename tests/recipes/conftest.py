"""Fixtures of the recipes' tests."""

import pytest
import torch


@pytest.fixture
def fp64():
    """Modules are made in fp64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
