# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in a checkpoint: peft merges them into the weights that they adapt.

In the state of a peft model a weight W is called `base_model.model.<module>.base_layer.weight`, and beside it are
`lora_A` (r, in) and `lora_B` (out, r). Merged: W + alpha / r * B A, computed in float32 and rounded once to W's dtype
(of an embedding table, B A is rounded first).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from embedrl_verl.errors import ConfigError
from embedrl_verl.export.weights import check_weights

META_FILE = "lora_train_meta.json"
PREFIX = "base_model.model."
_PART = re.compile(r"(.+)(\.lora_(?:embedding_)?[AB])(?:\.default)?(\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """The low-rank parts of a state.

    Attributes:
        rank, alpha, task_type: as peft's LoraConfig has them; the scale is alpha / rank.
        weights: module, and what of it (`.lora_A`, `.weight`), -> tensor.
    """

    rank: int
    alpha: int
    task_type: str | None
    weights: dict[tuple[str, str, str], torch.Tensor]

    def config(self, base_model: str | None = None) -> LoraConfig:
        """peft's configuration; `base_model`: its name, as it may be published."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=sorted({module for module, _, _ in self.weights}),
            task_type=self.task_type,
            base_model_name_or_path=base_model,
            inference_mode=True,
        )

    def write(self, folder: Path, base_model: str | None) -> None:
        """Write the adapter as peft does (`adapter_config.json`, `adapter_model.safetensors`)."""
        self.config(base_model).save_pretrained(str(folder))
        tensors = {PREFIX + "".join(name): tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def split_adapter(state: dict[str, torch.Tensor], folder: Path) -> tuple[dict[str, torch.Tensor], Adapter | None]:
    """Names without peft's wrapping, and the adapter if the state has one.

    Args:
        state: as `read_shards` gives it.
        folder: the checkpoint, for its `lora_train_meta.json`, which verl's checkpoint manager writes.
    """
    base: dict[str, torch.Tensor] = {}
    weights: dict[tuple[str, str, str], torch.Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(PREFIX)
        if part := _PART.fullmatch(name):
            weights[part[1], part[2], part[3] or ""] = tensor
        else:
            base[name.replace(".base_layer.", ".")] = tensor
    if not weights:
        return base, None
    file = folder / META_FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if int(meta["r"]) < 1 or int(meta["lora_alpha"]) < 1:
            raise ValueError(f"both must be 1 or more; got {meta['r']} and {meta['lora_alpha']}")
        return base, Adapter(int(meta["r"]), int(meta["lora_alpha"]), meta.get("task_type"), weights)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the checkpoint has LoRA weights, so {file} must say r and lora_alpha, without which they cannot be "
            f"scaled ({type(error).__name__}: {error}); write it as verl does: "
            '{"r": 32, "lora_alpha": 64, "task_type": "CAUSAL_LM"}'
        ) from error


def merge_adapter(
    state: dict[str, torch.Tensor], adapter: Adapter, model: PreTrainedModel, where: str
) -> dict[str, torch.Tensor]:
    """The weights with the adapter in them.

    Args:
        state: as `complete` returns it; changed in place.
        model: as `empty_model` makes it; used up.
        where: the checkpoint, for messages.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    if shared := sorted(module for module, _, _ in adapter.weights if f"{module}.weight" in tied):
        raise ConfigError(
            f"{where}: {shared[0]} is used in two places (tie_word_embeddings): it cannot be adapted in one"
        )
    model.load_state_dict(state, strict=False, assign=True)
    try:
        wrapped = get_peft_model(model, adapter.config(), low_cpu_mem_usage=True)
    except ValueError as error:  # a module that the model does not have, or that takes no adapter
        raise ConfigError(f"{where}: the adapter does not fit {type(model).__name__}: {error}") from error
    parts = {f"{PREFIX}{module}{side}.default{kind}": one for (module, side, kind), one in adapter.weights.items()}
    wanted = {name: one for name, one in wrapped.state_dict().items() if ".lora_" in name}
    check_weights(parts, wanted, where, f"an adapter of rank {adapter.rank} ({META_FILE})")
    wrapped.load_state_dict({name: one.float() for name, one in parts.items()}, strict=False, assign=True)
    merged = wrapped.merge_and_unload().state_dict()
    return {name: merged[name] for name in state}
