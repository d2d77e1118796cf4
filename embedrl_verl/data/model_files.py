# SPDX-License-Identifier: Apache-2.0
"""The files of a model: where they lie, and what tells one model from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from embedrl_verl.data.files import sha256_of, stamp_of

_MODEL_FILES = (
    *("*.safetensors", "*.bin", "config.json", "tokenizer*", "*.jinja", "*processor_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "adapter_config.json"),
    # A sentence-transformers model's own prompts, and the longest text that it reads.
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)


def model_folder(path: str) -> Path | None:
    """The folder itself, or of a hub id that in the local cache; None where there is nothing here."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    known = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    return Path(known).parent if isinstance(known, str) else None


def weight_stamps(path: str | None, *more: str) -> list[str]:
    """Sizes and times of change of a folder's weights, and of files of these names in it; of a hub id, a URL or None
    nothing."""
    patterns = ("*.safetensors", *more) if path else ()
    return [stamp_of(file) for pattern in patterns for file in sorted(Path(str(path)).glob(pattern))]


def model_digest(path: str) -> str | None:
    """Of every file of a model that its answers depend on, each read whole: sha256 (of a hub id in the local cache: its
    commit). None where there is nothing here.
    """
    folder = model_folder(path)
    if folder is None:
        return None
    if not Path(path).expanduser().is_dir():
        return f"commit {folder.name}"
    # sentence-transformers keeps a folder for each of its modules.
    pattern = "**/" if (folder / "modules.json").is_file() else ""
    files = {file for name in _MODEL_FILES for file in folder.glob(pattern + name) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def weights_of(path: str) -> tuple[int, int] | None:
    """Number of parameters of a model's safetensors files, and their size in bytes; None where there are none here."""
    from safetensors import safe_open

    folder = model_folder(path)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return None
    parameters = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                count = 1
                for side in opened.get_slice(name).get_shape():
                    count *= side
                parameters += count
    return parameters, sum(file.stat().st_size for file in files)
