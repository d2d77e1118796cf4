# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in a checkpoint: merged into the weights that they adapt.

In the state of a peft model a weight W is called `base_model.model.<module>.base_layer.weight`, and beside it are
`lora_A` (r, in) and `lora_B` (out, r). Merged: W + alpha / r * B A, computed in float32 and rounded once to W's dtype.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from embedrl_verl.errors import ConfigError

META_FILE = "lora_train_meta.json"
PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)


@dataclass(frozen=True)
class Adapter:
    """The low-rank parts of a state.

    Attributes:
        rank, alpha, task_type: as peft's LoraConfig has them; the scale is alpha / rank.
        linear: module -> (A (r, in), B (out, r)); of a convolution A is (r, in, *kernel), B (out, r, 1...).
        tables: embedding module -> (A (r, rows), B (dim, r)).
    """

    rank: int
    alpha: int
    task_type: str | None
    linear: dict[str, tuple[torch.Tensor, torch.Tensor]]
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]]


def split_adapter(state: dict[str, torch.Tensor], folder: Path) -> tuple[dict[str, torch.Tensor], Adapter | None]:
    """Names without peft's wrapping, and the adapter if the state has one.

    Args:
        state: as `read_shards` gives it.
        folder: the checkpoint, for its `lora_train_meta.json`.

    Raises:
        ConfigError: several adapters, half of one, or no (or another) rank and alpha in `lora_train_meta.json`.
    """
    sides: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    adapters: set[str] = set()
    base: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix(PREFIX)
        part = _PART.fullmatch(plain)
        if part is None:
            base[plain.replace(".base_layer.", ".")] = tensor
            continue
        adapters.add(part["adapter"] or "default")
        sides.setdefault((part["module"], part["table"] is not None), {})[part["side"]] = tensor
    if not sides:
        return base, None
    if len(adapters) > 1:
        raise ConfigError(f"{folder}: only one adapter can be merged; the checkpoint has {', '.join(sorted(adapters))}")
    half = sorted(module for (module, _), both in sides.items() if set(both) != {"A", "B"})
    if half:
        raise ConfigError(f"{folder}: an adapter needs lora_A and lora_B; {', '.join(half[:5])} has only one of them")
    pairs = {key: (both["A"], both["B"]) for key, both in sides.items()}
    rank, alpha, task_type = _read_meta(folder / META_FILE)
    for (module, _), (low, _high) in pairs.items():
        if low.shape[0] != rank:
            raise ConfigError(f"{folder / META_FILE}: r is {rank}, but {module} has rank {low.shape[0]}")
    linear = {module: pair for (module, table), pair in pairs.items() if not table}
    tables = {module: pair for (module, table), pair in pairs.items() if table}
    return base, Adapter(rank, alpha, task_type, linear, tables)


def merge_adapter(base: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """`base` with the adapter in it; other weights are the same objects.

    Raises:
        ConfigError: a module of the adapter has no weight in `base`, or one of another shape.
    """
    merged = dict(base)
    scale = adapter.alpha / adapter.rank
    updates = {
        module: (high.float().flatten(1) @ low.float().flatten(1)).reshape(len(high), *low.shape[1:])
        for module, (low, high) in adapter.linear.items()
    }
    updates |= {module: (high.float() @ low.float()).T for module, (low, high) in adapter.tables.items()}
    for module, update in updates.items():
        weight = base.get(f"{module}.weight")
        if weight is None or weight.shape != update.shape:
            found = "nothing" if weight is None else tuple(weight.shape)
            raise ConfigError(f"the adapter of {module} needs a weight of {tuple(update.shape)}; the model has {found}")
        merged[f"{module}.weight"] = (weight.float() + update * scale).to(weight.dtype)
    return merged


def write_adapter(adapter: Adapter, folder: Path, base_model: str | None) -> None:
    """Write the adapter as peft does (`adapter_config.json`, `adapter_model.safetensors`).

    Args:
        base_model: the model it adapts, as it may be published; None = unknown.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted([*adapter.linear, *adapter.tables]),
        task_type=adapter.task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for module, (low, high) in adapter.linear.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = low, high
    for module, (low, high) in adapter.tables.items():
        tensors[f"{PREFIX}{module}.lora_embedding_A"], tensors[f"{PREFIX}{module}.lora_embedding_B"] = low, high
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _read_meta(file: Path) -> tuple[int, int, str | None]:
    """(r, lora_alpha, task_type) that verl's checkpoint manager wrote."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = int(meta["r"]), int(meta["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the checkpoint has LoRA weights, so {file} must say r and lora_alpha, without which they cannot be "
            f"scaled ({type(error).__name__}: {error}); write it as verl does: "
            '{"r": 32, "lora_alpha": 64, "task_type": "CAUSAL_LM"}'
        ) from error
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"{file}: r and lora_alpha must be positive; got {rank} and {alpha}")
    return rank, alpha, meta.get("task_type")
