# SPDX-License-Identifier: Apache-2.0
"""One rank of an actor on verl's FSDP2 engine, with the attention and the cross-entropy of a GPU recipe, float32.

`python tests/platforms/actor_ranks.py CHECKPOINT ROWS OUT`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
ROWS is a file of case -> rows. With several ranks, the first has the images and the others have the videos. Rank 0
writes OUT: (setting, case) ->
{"log_probs": rows of float32 (L,), "gradients": name -> float32 tensor of the whole parameter, "loss"}.

With `peak` before CHECKPOINT, ROWS is a file of rows for one micro-batch, and OUT is JSON: most bytes at one moment of
an update and of log-probs, as torch's memory tracker counts them, resting weights and moments of Adam among them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from embedrl_verl.config.compose import compose
from embedrl_verl.embedder.processor import Encoded
from recipes.tiny_digits.environment import CPU_ENV

SETTINGS = {
    "gpu": ["platform=gpu"],
    "varlen, whole logits": ["platform=gpu", "actor_rollout_ref.model.use_fused_kernels=False"],
    "padded": ["platform=gpu", "attention=sdpa"],
}


def weights_of(ids: torch.Tensor) -> torch.Tensor:
    """A weight for each token's log-prob, from the token that it predicts."""
    return (ids % 7 - 3).float() / 100


def loss_of(model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Sum over ranks of the weighted log-probs: engines average over ranks, hence the factor."""
    parts = [
        (values[:-1] * weights_of(ids[1:])).sum()
        for values, ids in zip(model_output["log_probs"].unbind(), data["input_ids"].unbind(), strict=True)
    ]
    return torch.distributed.get_world_size(dp_group) * torch.stack(parts).sum(), {}


def build(checkpoint: str, overrides: list[str]) -> Any:
    """A worker as verl's hybrid worker makes the actor's, but in float32 on gloo."""
    from verl.trainer.config import CheckpointConfig
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

    from embedrl_verl.platforms.training_worker import NestedPositionIdsTrainingWorker

    config = compose([*overrides, f"actor_rollout_ref.model.path={checkpoint}", "embedrl.embedder.path=x"])
    worker = NestedPositionIdsTrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype="fp32",
                mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                use_torch_compile=False,
                max_token_len_per_gpu=16384,
                infer_max_token_len_per_gpu=16384,
                use_dynamic_bsz=True,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=0.0, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    return worker


def batch_of(worker: Any, rows: list[Encoded]) -> Any:
    """The rows as verl's trainer gives them to an engine; every token counts."""
    from verl.utils import tensordict_utils as tu

    from embedrl_verl.embedder.engine import tensordict_of

    data = tensordict_of(rows)
    settings = {
        "temperature": 1.0,
        "use_remove_padding": worker.engine_config.use_remove_padding,
        "use_fused_kernels": worker.engine_config.use_fused_kernels,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": 16384,
        "pad_token_id": 0,
    }
    tu.assign_non_tensor(data, **settings)
    everywhere = [torch.ones_like(row.input_ids) for row in rows]
    data["loss_mask"] = torch.nested.as_nested_tensor(everywhere, layout=torch.jagged)
    return data


def run_case(worker: Any, rows: list[Encoded]) -> dict[str, Any]:
    """Log-probs without gradients, then loss and gradients of the same rows."""
    from torch.distributed.tensor import DTensor

    engine, data = worker.engine, batch_of(worker, rows)
    with engine.eval_mode():
        log_probs = engine.infer_batch(data)["model_output"]["log_probs"]
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss_of, forward_only=False)
        gradients = {
            name.replace("_fsdp_wrapped_module.", ""): (
                weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            ).clone()
            for name, weight in engine.module.named_parameters()
            if weight.grad is not None
        }
    return {"log_probs": list(log_probs.unbind()), "gradients": gradients, "loss": sum(output["loss"])}


def main(checkpoint: str, rows_file: str, out: str) -> None:
    """Command line of the module docstring."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows: dict[str, list[Encoded]] = torch.load(rows_file, weights_only=False)
    result = {}
    for setting, overrides in SETTINGS.items() if size == 1 else [("gpu", SETTINGS["gpu"])]:
        worker = build(checkpoint, overrides)
        for case in rows if size == 1 else ("unlike",):
            mine = rows[case] if case != "unlike" else (rows["video"] if rank else rows["images"])
            result[setting, case] = run_case(worker, mine)
    if rank == 0:
        torch.save(result, out)
    torch.distributed.barrier()


def peaks(checkpoint: str, rows_file: str, out: str) -> None:
    """Command line of the module docstring, `peak`."""
    worker = build(checkpoint, SETTINGS["gpu"])
    engine, data = worker.engine, batch_of(worker, torch.load(rows_file, weights_only=False))

    def update() -> None:
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, loss_of, forward_only=False)
            engine.optimizer_step()

    def log_probs() -> None:
        with engine.eval_mode():
            engine.infer_batch(data)

    def peak(work: Callable[[], None]) -> int:
        tracker = MemTracker()
        tracker.track_external(engine.module, engine.optimizer)
        with tracker:
            work()
        (found,) = tracker.get_tracker_snapshot("peak").values()
        return int(found["Total"])

    update()  # the optimizer's state is made
    result = {"update": peak(update)}
    engine.optimizer_zero_grad()
    Path(out).write_text(json.dumps({**result, "log_probs": peak(log_probs)}))
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ.update(CPU_ENV)
    if sys.argv[1] == "peak":
        peaks(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
