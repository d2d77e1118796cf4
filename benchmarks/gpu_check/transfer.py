# SPDX-License-Identifier: Apache-2.0
"""verl's nccl checkpoint engine, which separate_async sends weights by, is registered (it needs cupy). Needs verl.

Nothing is sent: that takes two GPUs.
"""

from __future__ import annotations

from gpu_check.stage import Figures, need, need_cuda


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need_cuda(device)
    need("verl", "cupy")
    from verl.checkpoint_engine import CheckpointEngineRegistry

    engine = CheckpointEngineRegistry.get("nccl")
    figures.values["engine"] = f"{engine.__module__}.{engine.__qualname__}"
