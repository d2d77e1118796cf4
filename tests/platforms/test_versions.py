# SPDX-License-Identifier: Apache-2.0
"""The guard in front of everything that depends on upstream's inside."""

import pytest

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms.versions import installed_version, require_version


@pytest.mark.parametrize("found", ["0.24.0", "0.24.0+cpu", "0.24.0+cu130"])
def test_the_same_release_passes_whatever_its_build(found):
    require_version("vllm", found, "0.24.0", "the test")


@pytest.mark.parametrize("found", ["0.24.1", "0.25.0+cpu", None])
def test_another_release_is_named_with_the_fix(found):
    with pytest.raises(PluginError) as caught:
        require_version("vllm", found, "0.24.0", "the test")
    assert f"the test is written for vllm 0.24.0; found {found or 'none'}. Install vllm==0.24.0" in str(caught.value)


def test_a_distribution_that_is_not_installed_has_no_version():
    assert installed_version("no-such-distribution-of-any-name") is None
