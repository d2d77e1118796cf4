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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoProcessor

from embedrl_verl.data.media import LoadedItem
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.messages import IMAGE_PAD, VISION_END, VISION_START, EmbedInput
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.card import CardFacts, render_card
from embedrl_verl.export.checkpoint import Checkpoint, find_checkpoint
from embedrl_verl.export.lora import Adapter, merge_adapter, split_adapter, write_adapter
from embedrl_verl.export.record import RECORD_FILE, TrainingRecord, public_model
from embedrl_verl.export.sentence_files import sentence_files, write_sentence_files
from embedrl_verl.export.shards import read_shards
from embedrl_verl.export.weights import complete, empty_model, main_dtype, merge_megatron, read_files, write_files

ADAPTER_FOLDER = "lora_adapter"
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NOT_COPIED = frozenset({"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"})
# Where the training kept its copy, and how it ran attention, concerns nobody else.
_PRIVATE_KEYS = frozenset({"_name_or_path", "name_or_path", "attn_implementation", "_attn_implementation"})


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the model.
        kind: embedder or reasoner.
        weights: tensors.
        parameters: numbers in them.
        dtype: of most of them.
    """

    folder: Path
    kind: str
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
        profile: how an Embedder is prompted; auto needs `<emb>` in its tokenizer.
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
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        written = _write(found, staging, target.name, base_model, profile, keep_adapter)
        _open_permissions(staging)
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Exported(target, found.kind, *written)


def _write(
    found: Checkpoint, staging: Path, name: str, base_model: str | None, profile: str, keep_adapter: bool
) -> tuple[int, int, str]:
    """Fill the hidden folder. Returns the number of tensors, the numbers in them and their dtype."""
    base_name = base_model or (found.record.base_model if found.record else None)
    model = empty_model(load_config(found.huggingface))
    state, adapter = _read_weights(found, staging, base_model)
    if keep_adapter and adapter is None:
        raise ConfigError(f"{found.folder} has no LoRA adapter to keep; leave out --keep-adapter")
    if adapter is not None:
        state = merge_adapter(state, adapter)
    state = complete(state, model, str(found.folder))
    dtype = str(main_dtype(state)).removeprefix("torch.")
    config = _public_config(found.huggingface / "config.json", dtype, type(model).__name__)
    if found.kind == "embedder":
        config |= _cut_lengths(found.record, load_config(found.huggingface).get_text_config().hidden_size)
    _write_json(staging / "config.json", config)
    _copy_files(found.huggingface, staging)
    _check_processor(staging)
    if profile == "auto" and found.record is not None:
        profile = str(found.record.settings.get("profile", profile))  # the one it was trained with
    facts = _add_embedder(staging, profile) if found.kind == "embedder" else {}
    write_files(state, staging)
    if keep_adapter and adapter is not None:
        write_adapter(adapter, staging / ADAPTER_FOLDER, None if base_name is None else public_model(base_name))
    parameters = sum(tensor.numel() for tensor in state.values())
    card = CardFacts(
        name=name,
        kind=found.kind,
        architecture=type(model).__name__,
        parameters=parameters,
        dtype=dtype,
        base_model=base_name,
        record=found.record,
        step=found.step,
        lora=None if adapter is None else (adapter.rank, adapter.alpha),
        cut_to=tuple(config.get("matryoshka_dimensions") or ())[:-1],
        **facts,
    )
    (staging / "README.md").write_text(render_card(card), encoding="utf-8")
    return len(state), parameters, dtype


def _read_weights(
    found: Checkpoint, staging: Path, base_model: str | None
) -> tuple[dict[str, torch.Tensor], Adapter | None]:
    """The base weights under their modules' names, and the adapter if there is one."""
    if found.storage == "files":
        return read_files(found.huggingface), None
    if found.storage == "megatron":
        merged = staging / "megatron"
        merged.mkdir()
        state = merge_megatron(found.folder, found.huggingface, merged)
        state = {name: tensor.clone() for name, tensor in state.items()}
        shutil.rmtree(merged)
        return state, None
    state, adapter = split_adapter(read_shards(found.folder), found.folder)
    if adapter is None or state:
        return state, adapter
    if base_model is None:
        raise ConfigError(
            f"{found.folder} has only the weights of a LoRA adapter (save_lora_only); name the model that it was "
            "trained on with --base-model"
        )
    return read_files(_base_folder(base_model)), adapter


def _base_folder(base_model: str) -> Path:
    """The folder of a model by path or hub id."""
    if Path(base_model).is_dir():
        return Path(base_model)
    try:
        return Path(snapshot_download(base_model, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"--base-model {base_model} is neither a folder nor a model of the hub: {error}") from error


def _add_embedder(staging: Path, profile: str) -> dict[str, Any]:
    """Check the profile on the written folder, add sentence-transformers' files. Returns facts for the card."""
    config = load_config(staging)
    processor = EmbedProcessor.from_pretrained(staging, profile)
    dim = int(config.get_text_config().hidden_size)
    write_sentence_files(sentence_files(processor, family_of_config(config), dim), staging)
    item = LoadedItem("TEXT", "", (), ())
    prompt = processor.prompt_text(EmbedInput(item))
    image = f"{VISION_START}{IMAGE_PAD}{VISION_END}" if processor.profile.chat else f"{IMAGE_PAD} "
    return {
        "profile": processor.profile,
        "prompt": prompt.replace("TEXT", image + "TEXT"),
        "dim": dim,
        "image_tokens": processor.limits.tokens(is_frame=False),
    }


def _check_processor(staging: Path) -> None:
    try:
        processor = AutoProcessor.from_pretrained(staging, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the checkpoint's huggingface folder has no processor that can be loaded: {error}. Copy the tokenizer's "
            "and processor's files of the base model into it"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            "the checkpoint's huggingface folder has a tokenizer, but no image processor; copy the processor's files "
            "of the base model into it"
        )


def _public_config(file: Path, dtype: str, architecture: str) -> dict[str, Any]:
    """config.json with the dtype of the weights, without what only this machine can use."""

    def public(content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        kept = {key: public(value) for key, value in content.items() if key not in _PRIVATE_KEYS}
        return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in kept.items()}

    config = public(json.loads(file.read_text(encoding="utf-8")))
    config.pop("torch_dtype", None)
    return {**config, "architectures": [architecture], "dtype": dtype}


def _cut_lengths(record: TrainingRecord | None, dim: int) -> dict[str, Any]:
    """The keys by which vLLM knows to which lengths vectors of `dim` numbers may be cut; none if not trained for any.

    Raises:
        ConfigError: the record's matryoshka_dims are no lengths of such vectors.
    """
    trained = record.settings.get("matryoshka_dims") if record else None
    if not trained:
        return {}
    is_list = isinstance(trained, list) and all(type(one) is int and 1 <= one <= dim for one in trained)
    if not is_list:
        raise ConfigError(
            f"{RECORD_FILE}: matryoshka_dims must be a list of whole numbers in 1..{dim}; got {trained!r}"
        )
    return {"is_matryoshka": True, "matryoshka_dimensions": sorted({*trained, dim})}


def _copy_files(huggingface: Path, staging: Path) -> None:
    """Tokenizer, processor, chat templates and generation config, as they are but for names of local folders."""
    for file in sorted(huggingface.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
            shutil.copyfile(file, staging / file.name)
    templates = huggingface / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, staging / templates.name)
    tokenizer = staging / "tokenizer_config.json"
    if tokenizer.is_file():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        _write_json(tokenizer, {key: value for key, value in content.items() if key not in _PRIVATE_KEYS})


def _check_target(target: Path, found: Checkpoint, force: bool) -> None:
    """Refuse a target that holds something else than a model, or that the checkpoint lies in."""
    source = found.folder.resolve()
    if target.resolve() == source or target.resolve() in source.parents:
        raise ConfigError(f"--out {target} is the checkpoint or a folder around it; choose a folder of its own")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise ConfigError(f"--out {target} exists and is not empty; choose another folder, or replace it with --force")
    if not (target / "config.json").is_file():
        raise ConfigError(f"--force replaces only a folder with a model (config.json); {target} is none")


def _replace(staging: Path, target: Path) -> None:
    """Put the finished folder in place; what was there goes only after that."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(staging, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _open_permissions(folder: Path) -> None:
    """Temporary folders and safetensors' files are the owner's alone; here they get what the umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
