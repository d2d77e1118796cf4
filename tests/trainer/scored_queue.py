# SPDX-License-Identifier: Apache-2.0
"""Scores written into the real TransferQueue, and what verl's own GRPO makes of them.

`python tests/trainer/scored_queue.py CASES OUT`: CASES is JSON, {"lengths": tokens of each of 12 rows, "scores":
case -> scores or null}; OUT a torch file of case -> what was written and computed. `test_scored_queue.py` says what
must be in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from embedrl_verl.data.identity import ContentId
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.reward_stage import Row, ScoredRows, Vectors, write_scores


def rows_of(case: str, lengths: list[int]) -> list[Row]:
    """Three prompts of four rollouts."""
    tcot = parse_tcot("a")
    pair = [i // 4 for i in range(12)]
    return [
        Row(f"{case}{p}_{i % 4}_0", f"p{p}", 0, i % 4, ContentId(p, p), "x", "s", tcot, 0, 0, 0, None, lengths[i])
        for i, p in enumerate(pair)
    ]


def run(rows: list[Row], scores: list[float | None]) -> dict[str, Any]:
    score = torch.tensor([float("nan") if value is None else value for value in scores])
    keys = [row.key for row in rows]
    masks = torch.nested.as_nested_tensor(
        [torch.ones(row.response_tokens, dtype=torch.int64) for row in rows], layout=torch.jagged
    )
    first = {"uid": [row.uid for row in rows], "response_mask": masks, "loss_mask": masks.clone()}
    tq.kv_batch_put(
        keys=keys, partition_id="train", fields=tu.get_tensordict(first), tags=[{"status": "success"} for _ in keys]
    )
    batch = RewardBatch.build(
        side=torch.zeros(12, dtype=torch.int64),
        pair=torch.arange(12) // 4,
        rollout=torch.arange(12) % 4,
        content=torch.arange(12) // 4,
        tcots=[row.tcot for row in rows],
        required=["x"] * 12,
        embeddings=torch.eye(2)[[0] * 12],
    )
    scored = ScoredRows(rows, batch, Vectors(torch.zeros(12, 2), None, {}), {"score": score})
    write_scores(scored)
    trainer: Any = object.__new__(PPOTrainerSync)
    trainer.config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False, "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {"rollout": {"n": 4}},
        }
    )
    meta = tq.KVBatchMeta(keys=keys, partition_id="train", tags=[{} for _ in keys])
    trainer._compute_advantage(meta, metrics={})
    fields = ["uid", "rm_scores", "response_mask", "loss_mask", "advantages"]
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=fields)
    found = {name: list(data[name].unbind()) for name in fields if name != "uid"}
    return {**found, "uid": data.pop("uid").tolist(), "metrics": dict(scored.metrics)}


def main(cases: str, out: str) -> None:
    given = json.loads(Path(cases).read_text())
    options = {"runtime_env": {"py_executable": python()}, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=4, **options)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    found = {case: run(rows_of(case, given["lengths"]), scores) for case, scores in given["scores"].items()}
    torch.save(found, out)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
