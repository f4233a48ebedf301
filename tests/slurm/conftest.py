"""One cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing, running_cluster


def pytest_runtest_setup() -> None:
    if reason := missing():
        # Here and not in the fixture: one line for all
        pytest.skip(f"a real SLURM is needed: {reason}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
