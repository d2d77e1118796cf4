# SPDX-License-Identifier: Apache-2.0
"""Complete weights under the names of the modules, read, checked and written.

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
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from embedrl_verl.errors import ConfigError, ResourceError

MAX_SHARD_SIZE = "5GB"
_OLD_NAMES = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, under the names of the modules.

    Raises:
        ConfigError: there is none, one cannot be read, or two hold the same name.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no *.safetensors file; save the model in that format")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} cannot be read: {error}; copy it again") from error
        for name, tensor in tensors.items():
            name = module_name(name)
            if name in state:
                raise ConfigError(f"{folder}: the files hold {name} twice; leave one set of weights in the folder")
            state[name] = tensor
    return state


def module_name(name: str) -> str:
    """The module's name for a name in a checkpoint of before transformers 4.52."""
    for pattern, replacement in _OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def merge_megatron(folder: Path, huggingface: Path, target: Path) -> dict[str, torch.Tensor]:
    """Weights of a Megatron `dist_ckpt`, by verl's own merger in a process of its own (it needs a GPU).

    Args:
        folder: the checkpoint.
        huggingface: its configuration, where verl's merger looks for it too.
        target: empty folder for what the merger writes.

    Raises:
        ResourceError: Megatron is not installed.
        ConfigError: verl's merger cannot merge this checkpoint; the message has its last lines.
    """
    if importlib.util.find_spec("megatron") is None:
        raise ResourceError(
            f"{folder} is a Megatron checkpoint, which needs megatron-core to be read, and it is not installed. "
            "Export where the run was trained (docs/gpu.md), or save huggingface weights during training"
        )
    if huggingface.resolve() != (folder / "model" / "huggingface").resolve():
        raise ConfigError(
            f"{folder}: verl's merger reads model/huggingface and model/dist_ckpt; move the folders there"
        )
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "megatron"]
    command += ["--local_dir", str(folder), "--target_dir", str(target)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"{folder}: verl's merger gave up with code {done.returncode}; save huggingface weights during training "
            f"instead (mbridge). Its last lines:\n{done.stdout[-1500:]}"
        )
    return read_files(target)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The generation class of a configuration, without memory for its weights.

    Raises:
        ConfigError: the configuration has no image-text-to-text class.
    """
    try:
        with torch.device("meta"):
            # A checkpoint's configuration may name the attention of the run.
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        raise ConfigError(f"{config.model_type} has no generation class for images and text: {error}") from error
    model.tie_weights()
    return model


def complete(state: dict[str, torch.Tensor], model: PreTrainedModel, where: str) -> dict[str, torch.Tensor]:
    """Exactly the weights that `model` has, one copy of what it shares.

    Args:
        state: name -> tensor.
        model: as `empty_model` makes it.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a name is missing or unknown, a shape is another, or two copies of a shared weight differ.
    """
    state = dict(state)
    for alias, name in _aliases(model).items():
        if alias in state and name in state and not torch.equal(state[alias], state[name]):
            raise ConfigError(
                f"{where}: config.json says that {alias} and {name} are one weight (tie_word_embeddings), but they "
                "differ. Set tie_word_embeddings to false in the checkpoint's huggingface/config.json"
            )
        if alias in state:
            shared = state.pop(alias)
            state.setdefault(name, shared)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in _aliases(model)}
    missing, unknown = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    wrong = [name for name in sorted(shapes.keys() & state.keys()) if shapes[name] != state[name].shape]
    if missing or unknown or wrong:
        raise ConfigError(
            f"{where}: the weights must be those of {type(model).__name__}, all and no others. "
            f"{_count('missing', missing)}; {_count('unknown', unknown)}; {_count('of another shape', wrong)}. "
            "Does huggingface/config.json belong to these weights?"
        )
    return state


def main_dtype(state: dict[str, torch.Tensor]) -> torch.dtype:
    """The floating dtype of most numbers: what config.json has to say, so that loading casts nothing."""
    count: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            count[tensor.dtype] += tensor.numel()
    return count.most_common(1)[0][0]


def write_files(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `model.safetensors`, or parts of 5 GB and their index."""
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """Second name -> first name of each weight that the model uses in two places."""
    first: dict[int, str] = {}
    aliases = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(weight), name) != name:
            aliases[name] = first[id(weight)]
    return aliases


def _count(what: str, names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{what}: {len(names)}" + (f" ({', '.join(names[:shown])}{more})" if names else "")
