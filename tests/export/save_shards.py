# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a training run leaves it: FSDP2 on gloo ranks, saved by verl's own checkpoint manager.

`python tests/export/save_shards.py MODEL OUT --ranks N [--dtype bfloat16] [--lora]`

Writes `OUT/actor` (shards and huggingface weights) and the weights that an export must have to `OUT/expected.pt`; with
`--lora` those are peft's own merge, and there are also `OUT/adapter_only` and `OUT/base`, the model under the adapter.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

RANK, ALPHA = 5, 6  # an odd rank: the pieces of lora_A differ in size
TARGETS = ["q_proj", "v_proj", "down_proj", "qkv", "proj"]


def build(arguments: argparse.Namespace, base_folder: Path | None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model on every rank, and the weights that its export must have. `base_folder` gets the model under LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    with torch.no_grad():  # away from the base model, as after training
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape).to(weight.dtype) * 0.01)
    if not arguments.lora:
        return model, copy.deepcopy(model.state_dict())
    if base_folder is not None:
        model.save_pretrained(base_folder)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, bias="none")
    )
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) * 0.1)
    return wrapped, copy.deepcopy(wrapped).merge_and_unload().state_dict()


def rank_main(rank: int, arguments: argparse.Namespace) -> None:
    """One rank: shard, save."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoProcessor
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    out = Path(arguments.out)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=arguments.ranks
    )
    model, expected = build(arguments, out / "base" if rank == 0 else None)
    if rank == 0:
        torch.save(expected, out / "expected.pt")
    mesh = init_device_mesh("cpu", (arguments.ranks,), mesh_dim_names=("fsdp",))
    base = model.get_base_model() if arguments.lora else model
    for layer in base.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    processor = AutoProcessor.from_pretrained(arguments.model)
    saves = {"actor": {"save_contents": ["model"] if arguments.lora else ["model", "hf_model"]}}
    if arguments.lora:
        saves["adapter_only"] = {"save_contents": ["model"], "save_lora_only": True}
    for name, config in saves.items():
        manager = FSDPCheckpointManager(model, processing_class=processor, checkpoint_config=config)
        manager.save_checkpoint(str(out / name))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    os.environ["VERL_PLATFORM"] = "cpu"
    arguments.out = str(Path(arguments.out).absolute())
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    if arguments.ranks == 1:
        rank_main(0, arguments)
    else:
        torch.multiprocessing.spawn(rank_main, args=(arguments,), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
