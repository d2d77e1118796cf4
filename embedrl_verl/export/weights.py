# SPDX-License-Identifier: Apache-2.0
"""Complete weights under the names of the modules: read, and checked against the model.

The files carry the module names of the generation class (`model.language_model.layers...`, `model.visual...`). What
`save_pretrained` writes for Qwen2-VL and Qwen2.5-VL instead, `model.layers...` and `visual...`, is renamed when the
generation class loads it, but not when `AutoModel` does: transformers 5.9 ties that rule to the class name, and
sentence-transformers, which loads with `AutoModel`, gets a language part of random numbers. Module names load with
both, and in vLLM.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from embedrl_verl.errors import ConfigError, ResourceError

_OLD_NAMES = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, under the names of the modules."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no *.safetensors file; save the model in that format")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = {module_name(name): tensor for name, tensor in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} cannot be read: {error}; copy it again") from error
        if twice := sorted(state.keys() & tensors.keys()):
            raise ConfigError(f"{folder}: the files hold {twice[0]} twice; leave one set of weights in the folder")
        state |= tensors
    return state


def module_name(name: str) -> str:
    """The module's name for a name in a checkpoint of before transformers 4.52."""
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def read_megatron(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint's `model/dist_ckpt`, by verl's own merger in a process of its own (it needs a GPU).

    Args:
        folder: the checkpoint.
        scratch: folder for what the merger writes; stays as long as the weights are used.
    """
    if importlib.util.find_spec("megatron") is None:
        raise ResourceError(
            f"{folder} is a Megatron checkpoint, which needs megatron-core to be read, and it is not installed. "
            "Export where the run was trained (docs/gpu.md), or save huggingface weights during training"
        )
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "megatron"]
    command += ["--local_dir", str(folder), "--target_dir", str(scratch)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"{folder}: verl's merger gave up with code {done.returncode}; save huggingface weights during training "
            f"instead (mbridge). Its last lines:\n{done.stdout[-1500:]}"
        )
    return read_files(scratch)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The generation class of a configuration, without memory for its weights."""
    with torch.device("meta"):
        # A checkpoint's configuration may name the attention of the run.
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    return model


def complete(state: dict[str, torch.Tensor], model: PreTrainedModel, where: str) -> dict[str, torch.Tensor]:
    """Exactly the weights that `model` has, one copy of what it shares."""
    state, tied = dict(state), model.all_tied_weights_keys
    for alias, name in tied.items():
        if alias in state and name in state and not torch.equal(state[alias], state[name]):
            raise ConfigError(
                f"{where}: config.json says that {alias} and {name} are one weight (tie_word_embeddings), but they "
                "differ. Set tie_word_embeddings to false in the checkpoint's huggingface/config.json"
            )
        if alias in state:
            state.setdefault(name, state.pop(alias))
    wanted = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    check_weights(state, wanted, where, f"{type(model).__name__} (huggingface/config.json)")
    return state


def check_weights(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str, owner: str
) -> None:
    """Refuse what is missing, unknown or of another shape than the `wanted` weights of `owner`, by name."""
    other = {
        "missing": wanted.keys() - state.keys(),
        "unknown": state.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape},
    }
    told = [f"{what}: {len(names)} ({', '.join(sorted(names)[:5])})" for what, names in other.items() if names]
    if told:
        raise ConfigError(
            f"{where}: the weights must be those of {owner}, all and no others. {'; '.join(told)}. Copy the "
            "checkpoint's files of one run and step together"
        )


def main_dtype(state: dict[str, torch.Tensor]) -> str:
    """The floating dtype of most numbers, such as float32; config.json names it, so that loading casts nothing."""
    count: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            count[tensor.dtype] += tensor.numel()
    return str(count.most_common(1)[0][0]).removeprefix("torch.")
