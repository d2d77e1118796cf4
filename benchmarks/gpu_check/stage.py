# SPDX-License-Identifier: Apache-2.0
"""What the stages share: figures with limits, skipping, time and peak memory of some work."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GIB = 1024**3
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""bfloat16 matrix work a second without sparsity, by what a device's name holds (the makers' data sheets)."""


class Skipped(Exception):
    """A stage that this machine cannot run, with the reason."""


@dataclass
class Figures:
    """What a stage has measured.

    Attributes:
        values: name -> number or text.
        failed: sentences on what is not as it must be.
    """

    values: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def keep(self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        """Keep a number; outside of its limits, or not finite, the stage has failed."""
        self.values[name] = value
        limits = [f"{sign} {limit:g}" for sign, limit in (("<=", at_most), (">=", at_least)) if limit is not None]
        inside = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        if not (math.isfinite(value) and inside):
            self.failed.append(f"{name} must be {' and '.join(limits) or 'finite'}; got {value:g}")


def need(*modules: str) -> None:
    """Skip the stage where a module cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Skipped(f"needs {module}: {error}") from error


def need_cuda(device: str) -> None:
    """Skip the stage without CUDA."""
    if device != "cuda":
        raise Skipped("needs CUDA")


def measure(work: Callable[[], object], device: str, *, repeat: int = 1) -> tuple[float, float]:
    """(Seconds of the fastest of `repeat` calls, GiB at the highest moment above what was allocated before).

    The first call warms up and is not counted. Without CUDA the memory is 0: it is not counted there.
    """
    work()
    best = math.inf
    if device != "cuda":
        for _ in range(repeat):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        return best, 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, (torch.cuda.max_memory_allocated() - before) / GIB


def share_of_peak(flops: float, seconds: float) -> float | None:
    """Matrix work of this device as a share of its data sheet's bfloat16 peak; None for an unknown device."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops / seconds / peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, as a share of the largest right value."""
    found, right = found.detach().float(), right.detach().float()
    return float((found - right).abs().max() / right.abs().max())
