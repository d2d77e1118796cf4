# SPDX-License-Identifier: Apache-2.0
"""The files by which `SentenceTransformer(folder)` gives the Embedder's own vectors, without remote code.

sentence-transformers imports module classes of other packages only with `trust_remote_code=True`, so its own
Transformer, Pooling (last token) and Normalize do the work, told in `sentence_bert_config.json` what a profile is:

- the prompt as a chat template of its own, because the model's template may add a default system turn and cannot know
  suffix and tail. It renders the messages of `build_messages` as they are, and completes plain text, images and dicts;
- sizes of images and frames in pixels; padding on the left; no packing of rows (M-RoPE needs padded ones).

The modules carry their names of before sentence-transformers 5.4, which it still resolves, and by which vLLM finds the
pooling.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.embedder.template import embedding_template
from embedrl_verl.families import Family, facts_of

_MODALITIES = ("text", "image", "video", "message")
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def sentence_files(processor: EmbedProcessor, family: Family, dim: int) -> dict[str, Any]:
    """File name -> content, to be written as JSON.

    Args:
        processor: of the exported folder: profile, limits, tokenizer, longest prompt.
        family: of the model.
        dim: D, the length of a vector in numbers.
    """
    template = embedding_template(processor.profile, processor.limits, family, processor.max_length)
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {name: dict(output) for name in _MODALITIES}
    modalities["message"]["format"] = "structured"
    modules = ("Transformer", "Pooling", "Normalize")
    return {
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{name}" if index else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for index, name in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
            "processing_kwargs": {
                "chat_template": {"chat_template": template},
                "text": {"padding_side": "left", "max_length": processor.max_length},
                "image": {"size": _pixels(processor.limits, is_frame=False)},
                "video": {"size": _video_pixels(processor.limits, family), "do_sample_frames": False},
            },
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            **{f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING_MODES},
            "include_prompt": True,
        },
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": _versions(),
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }


def write_sentence_files(files: dict[str, Any], folder: Path) -> None:
    """Write what `sentence_files` returned."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pixels(limits: MediaLimits, *, is_frame: bool) -> dict[str, int]:
    low, high = limits.tokens(is_frame=is_frame)
    return {"shortest_edge": low * limits.token_side**2, "longest_edge": high * limits.token_side**2}


def _video_pixels(limits: MediaLimits, family: Family) -> dict[str, int]:
    size = _pixels(limits, is_frame=True)
    if facts_of(family).limits_whole_clip:
        size["longest_edge"] *= limits.max_frames
    return size


def _versions() -> dict[str, str]:
    """Versions that the files were written for; a package that is not installed is left out."""
    found = {}
    for name, package in (("sentence_transformers", "sentence-transformers"), ("transformers", "transformers")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found
