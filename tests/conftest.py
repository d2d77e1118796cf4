# SPDX-License-Identifier: Apache-2.0
"""The tests run on the platform `cpu`, offline and single-threaded, also on a machine with GPUs.

Generated cases are the same in every run and have all the time they need.
"""

import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import HealthCheck, settings

from embedrl_verl.platforms.forkserver import MODULES, PYTHON, ForkServer
from recipes.tiny_digits.environment import CPU_ENV

for _name, _value in CPU_ENV.items():
    os.environ.setdefault(_name, _value)
_CACHE = tempfile.mkdtemp(prefix="embedrl-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE  # read when `datasets` is imported, here and in all processes of the tests

settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for all tests and their processes, which starts when it is first used; the cache goes at the
    end. A shell starts what runs in the background with SIGINT ignored, and processes would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.add_cleanup(lambda: shutil.rmtree(_CACHE, ignore_errors=True))
    if PYTHON not in os.environ:
        server = ForkServer(os.environ, [*MODULES, "peft", "sklearn.datasets"], on_demand=True)
        os.environ[PYTHON] = server.python
        config.add_cleanup(server.close)


@pytest.fixture
def two_nodes():
    """A Ray cluster of two nodes with a CPU each (`ray.cluster_utils.Cluster`)."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
