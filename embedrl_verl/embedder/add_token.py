# SPDX-License-Identifier: Apache-2.0
"""Gives a Qwen-VL checkpoint the token `<emb>`, so that it can be trained as an Embedder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoProcessor

from embedrl_verl.embedder.loading import load_config, load_generation_model
from embedrl_verl.embedder.profiles import EMB_TOKEN, load_tokenizer, token_id
from embedrl_verl.errors import EmbedderError


def add_emb_token(path: str | Path, out: str | Path) -> int:
    """Write a copy of a checkpoint with `<emb>` in its tokenizer to the new or empty folder `out`; returns its id.

    The new token's embedding starts as the mean of all others. Qwen checkpoints have spare rows in their embedding
    matrix; where there is none left, the matrix grows by 64 rows. Weights keep their dtype. The folder appears whole.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise EmbedderError(f"{target} must be empty or not exist; choose another folder")
    config = load_config(path)
    if token_id(load_tokenizer(path), EMB_TOKEN) is not None:
        raise EmbedderError(f"{path}: the tokenizer has {EMB_TOKEN} already; use the checkpoint as it is")
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    old_tokens = len(processor.tokenizer)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": [EMB_TOKEN]}, replace_extra_special_tokens=False
    )
    number = int(processor.tokenizer.convert_tokens_to_ids(EMB_TOKEN))
    model = load_generation_model(path, config=config, dtype=getattr(config, "dtype", None) or torch.float32)
    if number >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(number + 1, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[number] = weight[:old_tokens].float().mean(dim=0).to(weight.dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        unfinished = Path(folder) / "model"
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if target.exists():
            target.rmdir()  # empty, see above
        os.replace(unfinished, target)
    return number
