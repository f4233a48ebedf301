"""The backends that the grid of tests runs."""

import os

import pytest

# Set by tests/tiny.py where there is no GPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled here: see test_gpu.py")
    ),
]
