# SPDX-License-Identifier: Apache-2.0
"""The tests run on the platform `cpu`, offline and single-threaded, also on a machine with GPUs.

Generated cases are the same in every run and have all the time they need.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from embedrl_verl.platforms.forkserver import MODULES, PYTHON, ForkServer
from recipes.tiny_digits.environment import CPU_ENV

for _name, _value in CPU_ENV.items():
    os.environ.setdefault(_name, _value)

settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for all tests and their processes; it starts when it is first used."""
    if PYTHON not in os.environ:
        server = ForkServer(os.environ, [*MODULES, "peft", "sklearn.datasets"], on_demand=True)
        os.environ[PYTHON] = server.python
        config.add_cleanup(server.close)
