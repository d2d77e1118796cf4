# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as training runs leave them: FSDP2 on gloo ranks, saved by verl's own checkpoint manager.

`python tests/export/save_shards.py ROOT`, where `ROOT/whole model` and `ROOT/tied model` lie, writes a folder for each
of `CASES`: `actor` (shards and huggingface weights), and the weights that an export must have in `expected.pt`. For
`lora` those are peft's own merge, and there are also `adapter_only`, and `base`, the model under the adapter.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

CASES = {"1": ("whole", 1, "bfloat16"), "2": ("whole", 2, "float32"), "tied": ("tied", 2, "float32")}
CASES |= {"lora": ("whole", 2, "float32")}
RANK, ALPHA = 5, 6  # an odd rank: the pieces of lora_A differ in size
TARGETS = ["q_proj", "v_proj", "down_proj", "qkv", "proj"]


def build(source: Path, dtype: str, *, lora: bool, base: Path | None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model on every rank, and the weights that its export must have. `base` gets the model under LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype))
    with torch.no_grad():  # away from the base model, as after training
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape).to(weight.dtype) * 0.01)
    if not lora:
        return model, copy.deepcopy(model.state_dict())
    if base is not None:
        model.save_pretrained(base)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, bias="none")
    )
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) * 0.1)
    return wrapped, copy.deepcopy(wrapped).merge_and_unload().state_dict()


def save_cases(rank: int, ranks: int, root: Path) -> None:
    """All cases of so many ranks: shard, save."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoProcessor
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    rendezvous = f"file://{root}/rendezvous{ranks}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    for name, (kind, wanted, dtype) in CASES.items():
        if wanted != ranks:
            continue
        source, out, lora = root / f"{kind} model", root / name, name == "lora"
        out.mkdir(exist_ok=True)
        model, expected = build(source, dtype, lora=lora, base=out / "base" if rank == 0 else None)
        if rank == 0:
            torch.save(expected, out / "expected.pt")
        for layer in (model.get_base_model() if lora else model).model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        saves: dict[str, dict[str, Any]] = {"actor": {"save_contents": ["model"] if lora else ["model", "hf_model"]}}
        if lora:
            saves["adapter_only"] = {"save_contents": ["model"], "save_lora_only": True}
        for folder, config in saves.items():
            processor = AutoProcessor.from_pretrained(source)
            manager = FSDPCheckpointManager(model, processing_class=processor, checkpoint_config=config)
            manager.save_checkpoint(str(out / folder))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["VERL_PLATFORM"] = "cpu"
    where = Path(sys.argv[1]).absolute()
    torch.multiprocessing.spawn(save_cases, args=(2, where), nprocs=2)
    save_cases(0, 1, where)
