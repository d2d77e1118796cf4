# SPDX-License-Identifier: Apache-2.0
"""Inputs that all runs share."""

import pytest

from tests.e2e import harness


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    harness.prepare(folder)
    return folder
