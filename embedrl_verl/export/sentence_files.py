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
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedrl_verl.embedder.messages import embedding_template
from embedrl_verl.embedder.processor import EmbedProcessor
from embedrl_verl.families import facts_of

_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_sentence_files(processor: EmbedProcessor, dim: int, folder: Path) -> None:
    """Write the files into a folder.

    Args:
        processor: of the exported folder: profile, family, limits, tokenizer, longest prompt.
        dim: D, the length of a vector in numbers.
    """
    limits = processor.limits
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    video = _pixels(*limits.tokens(is_frame=True), limits.token_side)
    if facts_of(processor.family).limits_whole_clip:
        video["longest_edge"] *= limits.max_frames
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
            for index, (path, module) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                **dict.fromkeys(("text", "image", "video"), output),
                "message": {**output, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
            "processing_kwargs": {
                "chat_template": {
                    "chat_template": embedding_template(
                        processor.profile, limits, processor.family, processor.max_length
                    )
                },
                "text": {"padding_side": "left", "max_length": processor.max_length},
                "image": {"size": _pixels(*limits.tokens(is_frame=False), limits.token_side)},
                "video": {"size": video, "do_sample_frames": False},
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
            "__version__": {  # that the files were written for
                name: version(name) for name in ("sentence_transformers", "transformers") if find_spec(name)
            },
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pixels(fewest: int, most: int, token_side: int) -> dict[str, int]:
    return {"shortest_edge": fewest * token_side**2, "longest_edge": most * token_side**2}
