"""Every test draws fresh inputs; the seed is printed with a failure and can be set again with MILES_TEST_SEED."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

# Two OpenMP threads that spin while others want the cores turn milliseconds into seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from miles_kernels import native


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's generator afresh for each test."""
    value = int(os.environ.get("MILES_TEST_SEED", secrets.randbits(31)))
    print(f"MILES_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["c", "torch"])
def formulation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the C kernels and with the torch ops that serve where there are none."""
    if request.param == "torch":
        with native.disabled():
            yield "torch"
    else:
        assert native.library() is not None, native.status()
        yield "c"
