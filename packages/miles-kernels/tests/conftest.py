"""Every test draws fresh inputs; the seed is printed with a failure and can be set again with MILES_TEST_SEED."""

from __future__ import annotations

import os
import secrets

import pytest

# Two OpenMP threads that spin while others want the cores turn milliseconds into seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's generator afresh for each test."""
    value = int(os.environ.get("MILES_TEST_SEED", secrets.randbits(31)))
    print(f"MILES_TEST_SEED={value}")
    torch.manual_seed(value)
    return value
