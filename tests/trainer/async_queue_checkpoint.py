# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the real TransferQueue with prompts in every state, restored as a resumed run restores it.

`python tests/trainer/async_queue_checkpoint.py FOLDER` prints one line of JSON; `test_async_queue.py` says what must be
in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils.dataset.rl_dataset import collate_fn

from embedrl_verl.platforms.forkserver import python
from embedrl_verl.trainer.modes_async import EGRLTrainerColocateAsync, clear_leftovers

PIXELS = bytes(range(256))


def prompt(pair: int, side: str) -> dict[str, Any]:
    """A row as TCoTDataset gives it, with media as bytes."""
    media = [{"bytes": PIXELS, "path": None}]
    return {
        "raw_prompt": [
            {"role": "user", "content": [{"type": "image", "image": PIXELS}, {"type": "text", "text": side}]}
        ],
        "index": pair,
        "data_source": "s",
        "embedrl_pair_id": f"p{pair}",
        "embedrl_side": side,
        "embedrl_query_content": 2**60 + pair,
        "embedrl_target_content": -(2**62) - pair,
        "embedrl_item": {"text": None, "images": media, "video": None},
    }


class Recorder:
    """Stands where verl's agent loop manager does; keeps what it is given."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def generate_sequences(self, batch: Any) -> None:
        self.batches.append(batch)


def write_rows(uid: str, sessions: int) -> None:
    """What an agent loop writes for finished sessions: the Embedder's input, then the row."""
    for session in range(sessions):
        key = f"{uid}_{session}_0"
        fields = TensorDict({"input_ids": torch.arange(session + 5)[None]}, batch_size=[1])
        tq.kv_batch_put(keys=[key], partition_id="embed", fields=fields, tags=[{}])
        row = TensorDict({"responses": torch.arange(session + 3)[None]}, batch_size=[1])
        tq.kv_batch_put(keys=[key], partition_id="train", fields=row, tags=[{"status": "success", "global_steps": 1}])


def columns(batch: Any) -> list[Any]:
    contents = [f"embedrl_{side}_content" for side in ("query", "target")]
    names = ("uid", "embedrl_pair_id", "embedrl_side", *contents, "raw_prompt", "embedrl_item")
    return [list(row) for row in zip(*(list(batch[name]) for name in names), strict=True)]


def main(folder: Path) -> dict[str, Any]:
    options = {"runtime_env": {"py_executable": python()}, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=4, **options)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    trainer: Any = object.__new__(EGRLTrainerColocateAsync)
    trainer.config = OmegaConf.create({"data": {"train_batch_size": 8, "gen_batch_size": 2, "embedrl": {}}})
    trainer.trainer_mode, trainer.global_steps, trainer.train_dataloader_it = "colocate_async", 1, None
    trainer.agent_loop_manager = recorder = Recorder()
    rows = [[prompt(pair, side) for side in ("query", "target")] for pair in range(4)]
    trainer.train_dataloader = [collate_fn(pair) for pair in rows]
    trainer._add_prompts_to_generate(8)
    before = columns(recorder.batches[0])
    uids = [row[0] for row in before]

    for uid in uids[:7]:
        tq.kv_put(key=uid, partition_id="train", tag={"status": "running"})
    for uid in uids[:5]:  # pair 0 is trained on, pair 1 ended, pair 2: query ended, target half-way; pair 3 has begun
        write_rows(uid, 2)
        tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})
    write_rows(uids[5], 1)
    tq.kv_clear(keys=uids[:2], partition_id="train")  # as when a batch is sampled; its rows stay until the step's end
    tags = tq.kv_list("train")["train"][uids[2]]
    tq.save_checkpoint(folder / "transfer_queue")

    for partition, keys in (tq.kv_list() or {}).items():
        if keys:
            tq.kv_clear(keys=list(keys), partition_id=partition)
    tq.load_checkpoint(folder / "transfer_queue")
    kept = clear_leftovers()
    listed = tq.kv_list()
    place = {uid: f"{row[1]}-{row[2]}" for uid, row in zip(uids, before, strict=True)}

    def named(keys: Any) -> list[str]:
        return sorted(f"{place[key.split('_')[0]]}{key[len(uids[0]) :]}" for key in keys)

    trainer.global_steps = 7
    reissued = trainer._reissue_inflight_prompts()
    again = columns(recorder.batches[1])
    after = {place[key]: tag for key, tag in tq.kv_list("train")["train"].items() if tag.get("is_prompt")}
    result = {
        "tags": tags,
        "kept": kept,
        "train": named(listed["train"]),
        "embed": named(listed["embed"]),
        "inputs": [row.tolist() for row in tq.kv_batch_get(keys=[f"{uids[2]}_1_0"], partition_id="embed")["input_ids"]],
        "reissued": reissued,
        "reissued_as_they_were": all(row == before[uids.index(row[0])] for row in again),
        "steps": {name: tag["global_steps"] for name, tag in after.items()},
        "groups": {name: place[tag["embedrl_group"]] for name, tag in after.items()},
    }
    tq.close()
    ray.shutdown()
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), default=lambda value: np.asarray(value).tolist()))
