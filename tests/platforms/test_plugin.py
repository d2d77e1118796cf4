# SPDX-License-Identifier: Apache-2.0
"""The plugin is light, loud, and in every process that imports verl."""

import logging
import os
import subprocess
import sys

import pytest
import verl

from embedrl_verl.errors import PluginError
from embedrl_verl.platforms import plugin


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_importing_the_package_costs_nothing():
    result = python(
        "import sys, embedrl_verl; print([m for m in ('torch', 'verl', 'numpy', 'ray') if m in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("modules", ["", "embedrl_verl"])
def test_verl_loads_the_plugin_and_says_so_once_a_process(modules):
    """By the entry point, and also when verl's variable names the package."""
    result = python(
        "import verl, sys; from verl.plugin.platform import get_platform\n"
        "print(get_platform().device_name, 'verl.trainer.ppo.v1' in sys.modules)",
        VERL_PLATFORM="cpu",
        VERL_USE_EXTERNAL_MODULES=modules,
    )
    assert result.stdout == "cpu False\n", result.stderr
    assert result.stderr.count("is loaded in verl") == 1


def test_without_discovery_nothing_is_registered():
    """The counterpart: what the previous test sees is the plugin's doing."""
    result = python(
        "import verl; from verl.plugin.platform import PlatformRegistry; print(PlatformRegistry.get('cpu'))",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert result.stdout == "None\n", result.stderr
    assert "is loaded" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["verl.trainer.ppo.v1", *plugin.TRAINER_MODULES[:2]])
def test_trainer_modes_are_registered_whichever_module_is_imported_first(first):
    result = python(
        f"import {first}\nfrom verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY as modes\n"
        "print(*sorted(name for name in modes if modes[name].__module__.startswith('embedrl_verl.')))"
    )
    assert result.stdout.split() == sorted(plugin.TRAINER_MODES), result.stderr


def test_another_verl_is_refused_aloud(monkeypatch, caplog):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with (
        caplog.at_level(logging.ERROR, logger="embedrl_verl"),
        pytest.raises(PluginError, match=r"verl 0\.9\.1; found 0\.10\.0"),
    ):
        plugin.register()
    assert "NOT loaded" in caplog.text
