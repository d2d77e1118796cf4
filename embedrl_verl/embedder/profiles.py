# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint wants to be prompted: one profile per family of public embedders.

All profiles share one property: the prompt *ends* at the token whose last hidden state is the embedding. So pooling is
always "the last token", in process, in the worker and in a stock vLLM pooling server (LAST pooling) alike.

| profile | checkpoints | prompt | pooled token |
|---|---|---|---|
| `embed_rl` | Embed-RL 2B/4B, and what this package trains | chat, no system turn, "one word" suffix | `<emb>` |
| `qwen3_vl_embedding` | Qwen3-VL-Embedding 2B/8B | chat, instruction in the system turn | last of the opened answer |
| `gme` | GME-Qwen2-VL 2B/7B | chat, instruction in the system turn, frames as images | `<|endoftext|>` |
| `vlm2vec_v2` | VLM2Vec-V2.0 (its adapter merged) | no chat template, bare media placeholders | last of the text |
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from embedrl_verl.embedder.loading import family_of_config, load_config, load_generation_model
from embedrl_verl.errors import ConfigError, EmbedderError

EMB_TOKEN = "<emb>"


@dataclass(frozen=True)
class EmbedderProfile:
    """The prompt of one family of checkpoints."""

    name: str
    chat: bool = True  # ChatML turns; False = one plain string with bare placeholders
    instruction_in_system: bool = False  # the instruction is the system turn; else it opens the user's text
    default_instruction: str = ""  # system turn of an item without an instruction
    end_instruction_with_stop: bool = False  # add "." to an instruction that ends without punctuation
    suffix: str = ""  # text after everything else of the user turn
    tail: str = ""  # what follows the opening of the assistant turn; the prompt ends here
    emb_token: str | None = None  # the token that `tail` must be, checked against the tokenizer; None = any last token
    empty_text: str = ""  # stands for an item with neither text nor media
    frames_as_images: bool = False  # the checkpoint has never seen videos; each frame is an image
    image_tokens: tuple[int, int] = (4, 1280)  # (minimum, maximum) visual tokens of one image
    frame_tokens: tuple[int, int] = (128, 300)  # the same of one frame
    families: tuple[str, ...] = ()  # model families that the profile fits; empty = all
    max_length: int | None = None  # longest prompt in tokens; None = what the model's position table allows


EMBED_RL = EmbedderProfile(
    name="embed_rl",
    suffix="Summarize the above content in one word:",
    tail=EMB_TOKEN,
    emb_token=EMB_TOKEN,
    image_tokens=(128, 768),
    frame_tokens=(128, 300),
)
_QWEN3_VL_EMBEDDING = EmbedderProfile(
    name="qwen3_vl_embedding",
    instruction_in_system=True,
    default_instruction="Represent the user's input.",
    end_instruction_with_stop=True,
    empty_text="NULL",
    image_tokens=(4, 1800),
    frame_tokens=(4, 768),
    families=("qwen3_vl",),
    max_length=8192,
)
_GME = EmbedderProfile(
    name="gme",
    instruction_in_system=True,
    default_instruction="You are a helpful assistant.",
    tail="<|endoftext|>",
    emb_token="<|endoftext|>",
    frames_as_images=True,
    families=("qwen2_vl",),
)
_VLM2VEC_V2 = EmbedderProfile(name="vlm2vec_v2", chat=False, frame_tokens=(4, 768), families=("qwen2_vl",))
PROFILES = {profile.name: profile for profile in (EMBED_RL, _QWEN3_VL_EMBEDDING, _GME, _VLM2VEC_V2)}


def resolve_profile(path: str | Path, name: str = "auto") -> EmbedderProfile:
    """The profile called `name`; with "auto", `embed_rl` if the tokenizer at `path` has `<emb>`. Nothing in another
    checkpoint tells how it was prompted, so it is not guessed."""
    if name != "auto":
        if name not in PROFILES:
            raise ConfigError(f"embedrl.embedder.profile must be auto or one of {', '.join(PROFILES)}; got {name}")
        return PROFILES[name]
    if token_id(load_tokenizer(path), EMB_TOKEN) is not None:
        return EMBED_RL
    raise EmbedderError(
        f"{path}: profile auto needs the token {EMB_TOKEN} in the tokenizer, and it has none. Train the Embedder with "
        f"it, or name the checkpoint's own profile: {', '.join(key for key in PROFILES if key != EMBED_RL.name)}"
    )


def fitting_profile(path: str | Path, profile: str | EmbedderProfile = "auto") -> EmbedderProfile:
    """The profile, after proof that the checkpoint can be read out as it says: family, token and embedding matrix."""
    config = load_config(path)
    profile = resolve_profile(path, profile) if isinstance(profile, str) else profile
    family = family_of_config(config)
    if profile.families and family not in profile.families:
        raise EmbedderError(
            f"{path}: profile {profile.name} is for {', '.join(profile.families)}; this checkpoint is {family}"
        )
    if profile.emb_token is None:
        return profile
    number, rows = token_id(load_tokenizer(path), profile.emb_token), config.get_text_config().vocab_size
    if number is None:
        raise EmbedderError(
            f"{path}: profile {profile.name} reads the embedding at the token {profile.emb_token}, which the tokenizer "
            f"does not have. Add it (embedrl add-emb {path} --out FOLDER) and train with it, or choose another profile"
        )
    if number >= rows:
        raise EmbedderError(
            f"{path}: the token {profile.emb_token} has id {number}, but the embedding matrix has {rows} rows; "
            "resize the model's token embeddings to the tokenizer and save again"
        )
    return profile


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; no code from the checkpoint is run."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EmbedderError(f"{path}: the Embedder's tokenizer cannot be loaded: {error}") from error


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Id of `token` if the tokenizer knows it as one token, else None."""
    number: int | None = tokenizer.get_vocab().get(token)
    return number


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
