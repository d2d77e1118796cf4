# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of a training run to a Hugging Face folder that others can load.

    export_checkpoint("runs/tiny_cpu/seed0/rl/checkpoints/global_step_40", "exports/reasoner")

Everything is written to a hidden folder beside the target, checked there, and renamed at the end: the target holds a
whole model or what it held before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoProcessor

from embedrl_verl.config.schema import EmbedderConfig
from embedrl_verl.data.media import LoadedItem
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.messages import IMAGE_PAD, VISION_END, VISION_START, EmbedInput
from embedrl_verl.embedder.processor import processor_for
from embedrl_verl.embedder.profiles import EMBED_RL
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.card import render_card
from embedrl_verl.export.checkpoint import Checkpoint, Kind, find_checkpoint
from embedrl_verl.export.lora import Adapter, merge_adapter, split_adapter
from embedrl_verl.export.record import (
    OF_EMBEDDER,
    TrainingRecord,
    prompt_settings,
    public_model,
    public_record,
    write_record,
)
from embedrl_verl.export.sentence_files import write_sentence_files
from embedrl_verl.export.shards import read_shards
from embedrl_verl.export.weights import complete, empty_model, main_dtype, read_files, read_megatron
from embedrl_verl.families import token_side

ADAPTER_FOLDER = "lora_adapter"
MAX_SHARD_SIZE = "5GB"
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NOT_COPIED = frozenset({"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"})
# Where the training kept its copy, and how it ran attention, concerns nobody else.
_PRIVATE_KEYS = frozenset({"_name_or_path", "name_or_path", "attn_implementation", "_attn_implementation"})


@dataclass(frozen=True)
class Exported:
    """What was written: a model of `weights` tensors with `parameters` numbers, most of them of `dtype`."""

    folder: Path
    kind: Kind
    weights: int
    parameters: int
    dtype: str


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    base_model: str | None = None,
    profile: str = "auto",
    force: bool = False,
    keep_adapter: bool = False,
) -> Exported:
    """Write the Hugging Face folder of a checkpoint.

    Args:
        checkpoint: folder of a checkpoint, or of a step (`global_step_N`).
        out: folder to write; must not exist or be empty, unless `force`.
        kind: embedder or reasoner; None = if it can be told.
        base_model: name or path of the model that training began with, for the card, and for its weights if the
            checkpoint has only those of a LoRA adapter. None = what training.json says.
        profile: how an Embedder is prompted; auto = what training.json says, or else needs `<emb>` in its tokenizer.
        force: replace `out` if it holds a model.
        keep_adapter: also write the LoRA adapter, as peft does, to `lora_adapter/`.

    Raises:
        ConfigError: the checkpoint is incomplete or does not fit its configuration, or `out` may not be replaced.
        EmbedderError: an Embedder whose tokenizer lacks the profile's token, or a profile of another family.
        ResourceError: Megatron is needed and not installed.
    """
    found = find_checkpoint(checkpoint, kind)
    target = Path(out).expanduser().absolute()
    _check_target(target, found, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as hidden:
        new, old, scratch = (Path(hidden) / name for name in ("new", "old", "scratch"))
        new.mkdir()
        scratch.mkdir()
        state, adapter = _read_weights(found, base_model, scratch)
        if keep_adapter and adapter is None:
            raise ConfigError(f"{found.folder} has no LoRA adapter to keep; leave out --keep-adapter")
        base_model = base_model or found.record.base_model
        model = empty_model(load_config(found.huggingface))
        state = complete(state, model, str(found.folder))
        if adapter is not None:
            state = merge_adapter(state, adapter, model, str(found.folder))
        dtype, parameters = main_dtype(state), sum(tensor.numel() for tensor in state.values())
        _write_config(found, new, dtype, type(model).__name__)
        facts = _add_embedder(found, new, profile) if found.kind == "embedder" else _prompt_facts(found)
        save_torch_state_dict(state, new, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
        if keep_adapter and adapter is not None:
            adapter.write(new / ADAPTER_FOLDER, None if base_model is None else public_model(base_model))
        facts |= {"architecture": type(model).__name__, "parameters": parameters, "dtype": dtype}
        facts["lora"] = None if adapter is None else (adapter.rank, adapter.alpha)
        card = render_card(found, name=target.name, base_model=base_model, **facts)
        (new / "README.md").write_text(card, encoding="utf-8")
        if found.record != TrainingRecord():
            write_record(new, public_record(found.record))
        for file in new.rglob("*.safetensors"):  # these are made readable by their owner alone
            shutil.copymode(new / "README.md", file)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:  # also Ctrl-C: the hidden folder with the old model is about to go
            if old.exists():
                os.replace(old, target)
            raise
    return Exported(target, found.kind, len(state), parameters, dtype)


def _check_target(target: Path, found: Checkpoint, force: bool) -> None:
    """Refuse a target that holds something else than a model, or that the checkpoint lies in."""
    source = found.folder.resolve()
    if target.resolve() in (source, *source.parents):
        raise ConfigError(f"--out {target} is the checkpoint or a folder around it; choose a folder of its own")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise ConfigError(f"--out {target} exists and is not empty; choose another folder, or replace it with --force")
    if not (target / "config.json").is_file():
        raise ConfigError(f"--force replaces only a folder with a model (config.json); {target} is none")


def _read_weights(
    found: Checkpoint, base_model: str | None, scratch: Path
) -> tuple[dict[str, torch.Tensor], Adapter | None]:
    """The base weights under their modules' names, and the adapter if there is one."""
    if found.storage == "files":
        return read_files(found.huggingface), None
    if found.storage == "megatron":
        return read_megatron(found.folder, scratch), None
    state, adapter = split_adapter(read_shards(found.folder), found.folder)
    if state:
        return state, adapter
    if base_model is None:
        raise ConfigError(
            f"{found.folder} has only the weights of a LoRA adapter (save_lora_only); name the model that it was "
            "trained on with --base-model"
        )
    folder = base_model
    if not Path(base_model).is_dir():
        try:
            folder = snapshot_download(base_model, allow_patterns=["*.safetensors", "*.json"])
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ConfigError(
                f"--base-model {base_model} is neither a folder nor a model of the hub: {error}"
            ) from error
    return read_files(Path(folder)), adapter


def _write_config(found: Checkpoint, new: Path, dtype: str, architecture: str) -> None:
    """config.json with the dtype of the weights; tokenizer, processor, chat templates and generation config as they are
    but for names of local folders.
    """
    config = _public(json.loads((found.huggingface / "config.json").read_text(encoding="utf-8")), dtype)
    config.pop("torch_dtype", None)
    config |= {"architectures": [architecture], "dtype": dtype}
    if trained := found.kind == "embedder" and found.record.settings.get("matryoshka_dims"):
        # By these vLLM knows to which lengths vectors may be cut.
        config |= {"is_matryoshka": True, "matryoshka_dimensions": sorted({*trained, _dim(found.huggingface)})}
    _write_json(new / "config.json", config)
    for file in sorted(found.huggingface.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
            shutil.copyfile(file, new / file.name)
    templates = found.huggingface / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, new / templates.name)
    tokenizer = new / "tokenizer_config.json"
    if tokenizer.is_file():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        _write_json(tokenizer, {key: value for key, value in content.items() if key not in _PRIVATE_KEYS})
    fix = "copy the tokenizer's and processor's files of the base model into it"
    try:
        processor = AutoProcessor.from_pretrained(new, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{found.huggingface} has no processor that can be loaded: {error}; {fix}") from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(f"{found.huggingface} has a tokenizer, but no image processor; {fix}")


def _public(content: Any, dtype: str) -> Any:
    """A (part of a) model's configuration with the dtype of the weights, without what only this machine can use."""
    if not isinstance(content, dict):
        return content
    kept = {key: _public(value, dtype) for key, value in content.items() if key not in _PRIVATE_KEYS}
    return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in kept.items()}


def _add_embedder(found: Checkpoint, new: Path, profile: str) -> dict[str, Any]:
    """Check the profile on the written folder, add sentence-transformers' files. Returns facts for the card."""
    trained = {name: value for name, value in found.record.settings.items() if name in OF_EMBEDDER}
    given = {} if profile == "auto" else {"profile": profile}
    processor, dim = processor_for(EmbedderConfig(path=str(new), **{**trained, **given})), _dim(new)
    write_sentence_files(processor, dim, new)
    prompt = processor.prompt_text(EmbedInput(LoadedItem("TEXT", "", (), (), None, None)))
    image = f"{VISION_START}{IMAGE_PAD}{VISION_END}" if processor.profile.chat else f"{IMAGE_PAD} "
    return {
        "profile": processor.profile,
        "profile_name": None if processor.profile == EMBED_RL else processor.profile.name,
        "prompt": repr(prompt.replace("TEXT", image + "TEXT")),
        "dim": dim,
        "image_tokens": processor.limits.tokens(is_frame=False),
        "cut_to": sorted({*(found.record.settings.get("matryoshka_dims") or ())} - {dim}),
    }


def _prompt_facts(found: Checkpoint) -> dict[str, Any]:
    """How a Reasoner is asked: as in its run, or else by the defaults of its family."""
    family = family_of_config(load_config(found.huggingface))
    prompt = prompt_settings(found.record.settings, family)
    return {"prompt": prompt, "token_side": token_side(prompt["family"])}


def _dim(folder: Path) -> int:
    return int(load_config(folder).get_text_config().hidden_size)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
