"""A cluster for the tests of this folder, started once for each process that runs tests: it takes a second."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("cluster.py"))
cluster_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cluster_module)


@pytest.fixture(scope="session")
def _cluster():
    if reason := cluster_module.missing():
        pytest.skip(f"no Slurm here: {reason}")
    pytest.importorskip("submitit")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    try:
        with cluster_module.Cluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(_cluster, monkeypatch, tmp_path):
    """Slurm, for this process and those that it starts, which find modules in the test's folder."""
    for key, value in _cluster.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(tmp_path)
    yield _cluster
    _cluster.run("scancel", "--user=root")
    _cluster.wait_for("the end of the jobs", lambda: not _cluster.run("squeue", "-h"))
