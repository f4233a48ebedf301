"""One cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(f"a real SLURM is needed: {reason}")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
