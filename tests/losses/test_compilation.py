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
from kd.losses.triton_rows import NUM_WARPS

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


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "mixed_kl"])
@pytest.mark.parametrize("capability", ["sm_80", "sm_90"])
def test_four_rows_of_a_kl_run_on_a_multiprocessor_at_a_time(report, capability, name):
    assert report["kernels"][f"{capability} {name}"]["REG"] <= 65536 // (4 * 32 * NUM_WARPS)


def test_exponentials_flush_to_zero(report):
    powers = report["powers"]
    assert len(powers) == 2 * len(DIVERGENCES)
    assert set(map(tuple, powers.values())) == {("ex2.approx.ftz.f32",)}


def test_a_divergence_that_the_kernel_does_not_know_does_not_compile(report):
    from_sums, from_mixture = report["refusals"]
    assert "the first pass does not know this divergence" in from_sums
    assert "_terms does not know this divergence" in from_mixture
