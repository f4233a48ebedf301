"""The row kernel compiled for GPUs that need not be there: it fits their registers, and once is
enough.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd.losses import DIVERGENCES

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).with_name("compile_rows.py")
    return json.loads(subprocess.check_output([sys.executable, script], env=environment, text=True))


def test_no_number_of_rows_and_no_chunk_compiles_the_kernel_anew(report):
    assert len(report["counts"]) == 7
    assert set(report["counts"]) == {1}


def test_every_kernel_compiles_and_spills_no_register(report):
    kernels = report["kernels"]
    assert len(kernels) == 2 * len(DIVERGENCES) + 3
    for name, resources in kernels.items():
        assert resources["LOCAL"] == resources["STACK"] == 0, name
        # of 65536 a multiprocessor, with 256 threads a row: two rows at a time at least
        assert 0 < resources["REG"] <= 128, name


def test_a_divergence_that_the_kernel_does_not_know_does_not_compile(report):
    from_sums, from_mixture = report["refusals"]
    assert "the first pass does not know this divergence" in from_sums
    assert "_terms does not know this divergence" in from_mixture
