# SPDX-License-Identifier: Apache-2.0
"""The upstream versions this package is written for, and the guard that every patch and every use of upstream
internals calls.
"""

from importlib.metadata import PackageNotFoundError, version

from embedrl_verl.errors import PluginError

VERL_VERSION = "0.9.1"
VLLM_VERSION = "0.24.0"
TRANSFORMERS_VERSION = "5.9.0"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution as its metadata gives it, or None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def require_version(name: str, found: str | None, expected: str, needed_for: str) -> None:
    """Raises PluginError unless `found` is the release `expected`; a local part such as `+cpu` is ignored."""
    if found is None or found.partition("+")[0] != expected:
        raise PluginError(
            f"{needed_for} is written for {name} {expected}; found {found or 'none'}. "
            f"Install {name}=={expected}, or a release of embedrl-verl made for the other version."
        )
