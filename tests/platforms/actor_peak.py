# SPDX-License-Identifier: Apache-2.0
"""Peak bytes of an actor's passes on verl's FSDP2 engine, one float32 rank, as torch's memory tracker counts them.

`python tests/platforms/actor_peak.py CHECKPOINT ROWS OUT`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
ROWS is a file of rows for one micro-batch; OUT is JSON: {"update": bytes, "log_probs": bytes}, resting weights and
moments of Adam among them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import actor_ranks  # beside this script
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from recipes.tiny_digits.environment import CPU_ENV


def peak(work: Any, engine: Any) -> tuple[int, dict[str, int]]:
    """Most bytes at one moment of `work()`, and what they were."""
    tracker = MemTracker()
    tracker.track_external(engine.module, engine.optimizer)
    with tracker:
        work()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    kinds = {str(kind).rpartition(".")[2]: int(size) for kind, size in found.items()}
    return kinds.pop("Total", sum(kinds.values())), kinds


def main(checkpoint: str, rows: str, out: str) -> None:
    """Command line of the module docstring."""
    worker = actor_ranks.build(checkpoint, ["platform=gpu"])
    engine = worker.engine
    data = actor_ranks.batch_of(worker, torch.load(rows, weights_only=False))

    def update() -> None:
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, actor_ranks.loss_of, forward_only=False)
            engine.optimizer_step()

    def log_probs() -> None:
        with engine.eval_mode():
            engine.infer_batch(data)

    update()  # the optimizer's state is made
    result = {}
    result["update"], kinds = peak(update, engine)
    result["update kinds"] = kinds
    engine.optimizer_zero_grad()
    result["log_probs"], result["log_probs kinds"] = peak(log_probs, engine)
    Path(out).write_text(json.dumps(result))
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ.update(CPU_ENV)
    main(*sys.argv[1:])
