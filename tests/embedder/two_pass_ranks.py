# SPDX-License-Identifier: Apache-2.0
"""One rank of a two-pass step on verl's engine; `test_two_pass.py` starts one or two of them.

`python tests/embedder/two_pass_ranks.py CHECKPOINT OUT DTYPE`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
Rank 0 writes OUT: case -> {"loss", "gradients": name -> float32 tensor of the whole parameter}.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from inputs import LOSS, contrastive_cases, section  # a script: its own folder is on the path

from embedrl_verl.config.schema import EmbedderTrainConfig
from recipes.tiny_digits.environment import CPU_ENV

BUDGET = 260
"""Tokens of a micro-batch: a few rows, another number of them in each."""


def main(checkpoint: str, out: str, dtype: str) -> None:
    """Run every case on this rank's share of its pairs."""
    from torch.distributed.tensor import DTensor

    from embedrl_verl.embedder.processor import processor_for
    from embedrl_verl.embedder.worker import EmbedderWorker, worker_config
    from embedrl_verl.stage1.rows import EncodedPair, rows_of_pairs
    from embedrl_verl.stage1.step import two_pass_step

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Gradients are not clipped and weights hardly move, so that cases follow one another.
    train = EmbedderTrainConfig(enable=True, lr=1e-12, warmup_steps=0, clip_grad=1e9, max_tokens_per_gpu=BUDGET, **LOSS)
    config = section(checkpoint, dtype=dtype, max_tokens_per_gpu=BUDGET, train=train)
    processor = processor_for(config)
    worker = EmbedderWorker(worker_config(config, ranks_per_node=size))
    worker.reset()
    gradients: dict[str, torch.Tensor] = {}
    update = worker.engine.optimizer_step

    def keep_and_update() -> float:
        """verl forgets the gradients after the update."""
        for key, value in worker.engine.module.named_parameters():
            if value.grad is not None:
                whole = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
                gradients[key] = whole.clone()
        return update()

    worker.engine.optimizer_step = keep_and_update
    result: dict[str, Any] = {}
    for name, pairs in contrastive_cases().items():
        encoded = [
            EncodedPair(
                processor.encode(query),
                processor.encode(target),
                tuple(processor.encode(one) for one in negatives),
                contents,
            )
            for query, target, negatives, contents in pairs
        ]
        # Uneven on purpose: the first rank has all but two pairs.
        places = list(range(len(pairs)))
        mine = places if size == 1 else (places[:-2] if rank == 0 else places[-2:])
        gradients.clear()
        metrics = two_pass_step(worker, rows_of_pairs([encoded[i] for i in mine], mine), config.train)
        result[name] = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "gradients": dict(gradients)}
    if rank == 0:
        torch.save(result, out)


if __name__ == "__main__":
    os.environ.update(CPU_ENV)
    main(*sys.argv[1:])
