# SPDX-License-Identifier: Apache-2.0
"""50 mixed inputs through verl worker groups with 1 and 2 data-parallel ranks, fed by the driver and by TransferQueue;
in a process of its own that `test_engines.py` starts: `python tests/embedder/engines.py CHECKPOINT OUT`

OUT is a file for `torch.load`: a dict of float32 (rows, D) tensors, and what went wrong in `failures`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import torch
from inputs import ROWS, mixed_inputs, section  # a script: its own folder is on the path

from embedrl_verl.config.schema import EmbedderTrainConfig
from embedrl_verl.errors import EmbedderError
from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.environment import CPU_ENV


def through_verl(checkpoint: str) -> dict[str, Any]:
    """Vectors of worker groups with 1 and 2 ranks; rows once from the driver, once from TransferQueue."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf
    from verl.single_controller.ray import RayResourcePool

    from embedrl_verl.embedder.client import EmbedderClient
    from embedrl_verl.embedder.processor import processor_for
    from embedrl_verl.embedder.worker import start_embedder_worker_group

    options = {"runtime_env": {"py_executable": python()}, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=8, num_gpus=3, **options)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    # A budget of a few rows a batch, so that there are several batches on each rank.
    train = EmbedderTrainConfig(enable=True, lr=1e-3, warmup_steps=0, max_tokens_per_gpu=800)
    config = section(checkpoint, max_tokens_per_gpu=800, train=train)
    run_config = OmegaConf.create({"trainer": {"ray_wait_register_center_timeout": 300}})
    processor = processor_for(config)
    rows = [processor.encode(one) for one in mixed_inputs(ROWS)]
    keys = [f"row_{i}_0" for i in range(ROWS)]
    result: dict[str, Any] = {}
    for ranks in (1, 2):
        pool = RayResourcePool(process_on_nodes=[ranks], use_gpu=True, max_colocate_count=2)
        group, _ = start_embedder_worker_group(run_config, config, pool)
        client = EmbedderClient(group)
        result[f"driver_{ranks}"], failures = client.embed(rows)
        for key, row in zip(keys, rows, strict=True):
            tq.kv_batch_put(keys=[key], partition_id="embed", fields=row.to_tensordict(), tags=[{}])
        result[f"queue_{ranks}"], more = client.embed_rows(keys, "embed")
        result[f"failures_{ranks}"] = {**failures, **more}
        # Fewer rows than ranks, rows of one length, and a key that is not there.
        result[f"one_{ranks}"], _ = client.embed_rows(keys[5:6], "embed")
        result[f"equal_{ranks}"], _ = client.embed([rows[3]] * 4)
        try:
            client.embed_rows([*keys[:3], "row_99_0"], "embed")
        except EmbedderError as error:
            result[f"missing_{ranks}"] = str(error)
        poisoned = dict(rows[1].multi_modal_inputs)
        poisoned["pixel_values"] = torch.full_like(poisoned["pixel_values"], float("nan"))
        bad = dataclasses.replace(rows[1], multi_modal_inputs=poisoned)
        result[f"poisoned_{ranks}"], result[f"poisoned_failures_{ranks}"] = client.embed([rows[0], bad, rows[2]])
        # One training step on rows of the queue, as co-training takes it; odd rows, so that ranks have unequal shares.
        gradient = torch.randn(ROWS - 1, 128, generator=torch.Generator().manual_seed(0))
        result[f"metrics_{ranks}"] = client.train_rows(keys[1:], gradient, "embed")
        result[f"trained_{ranks}"], _ = client.embed(rows)
        tq.kv_clear(keys=keys, partition_id="embed")
    ray.shutdown()
    return result


def main() -> None:
    """Command line of the module docstring."""
    checkpoint, out = sys.argv[1:]
    os.environ.update(CPU_ENV)
    torch.save(through_verl(checkpoint), out)


if __name__ == "__main__":
    main()
