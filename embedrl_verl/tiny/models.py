# SPDX-License-Identifier: Apache-2.0
"""Complete tiny Hugging Face models of the three Qwen-VL families, made on the spot with random weights.

`build_tiny_model` writes a folder that transformers, vLLM (CPU and GPU) and verl load like a released checkpoint:
config, generation config, safetensors, fast tokenizer, chat template, image and video processor. About 0.8 million
parameters with the defaults. Three constraints shape the sizes:

- vLLM's CPU attention wants a head size of 32 or 64 (16 fails at the first forward), so heads = hidden_size / 32;
- the three sections of M-RoPE must sum to half the head size;
- the output matrix is not tied to the input embedding, as in the models of 7B and more; `tied` makes one as the smaller
  ones have it.

Command: `python -m embedrl_verl.tiny.models --out DIR [--family qwen2_vl] [--seed 0]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

from embedrl_verl.errors import ConfigError
from embedrl_verl.tiny.tokenizer import build_tokenizer

TinyFamily = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
HEAD_SIZE = 32
# With the usual 1e4 or 1e6 the axes of an image get wavelengths of hundreds of tokens, and a model of two layers cannot
# tell neighbouring columns apart. Its sequences are about a hundred tokens long: 16 pairs from wavelength 6 to 100.
ROPE_THETA = 20.0
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Pixels of one patch side; a visual token is 2 x 2 patches: 28 px, for Qwen3-VL 32 px.
PATCH_SIZE: dict[str, int] = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}


def build_tiny_model(
    out_dir: str | Path,
    *,
    family: TinyFamily = "qwen2_vl",
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 2,
    vision_size: int = 64,
    vision_layers: int = 2,
    max_positions: int = 4096,
    with_emb_token: bool = True,
    tied: bool = False,
) -> Path:
    """Write a complete tiny model folder and return its path.

    Args:
        out_dir: folder to write, made if missing; files of the same name are overwritten.
        family: which architecture; the folder's `config.json` carries it as `model_type`.
        seed: seed of the random weights; the global random state of torch is left as it was.
        hidden_size: width of the language part, a multiple of 64 (2 query heads a key-value head, head size 32).
        num_layers: language layers.
        vision_size: width of the vision part, a multiple of 32.
        vision_layers: vision layers, at least 1; the last one attends over the whole image.
        max_positions: longest sequence in tokens.
        with_emb_token: give the tokenizer the token `<emb>` (an Embedder needs it, a Reasoner ignores it).
        tied: the output matrix is the input embedding.

    Raises:
        ConfigError: an unknown family, or sizes that break one of the constraints above.
    """
    if family not in get_args(TinyFamily):
        raise ConfigError(f"family must be one of {get_args(TinyFamily)}; got {family!r}")
    if hidden_size < 64 or hidden_size % 64:
        raise ConfigError(f"hidden_size must be a positive multiple of 64 (head size 32, two heads); got {hidden_size}")
    if vision_size < 32 or vision_size % 32:
        raise ConfigError(f"vision_size must be a positive multiple of 32 (vision head size 32); got {vision_size}")
    if min(num_layers, vision_layers) < 1:
        raise ConfigError(f"num_layers and vision_layers must be at least 1; got {num_layers} and {vision_layers}")
    tokenizer = build_tokenizer(with_emb_token=with_emb_token)
    tokenizer.model_max_length = max_positions
    sizes = (hidden_size, num_layers, vision_size, vision_layers, max_positions)
    model = _build_model(family, tokenizer, *sizes, seed=seed, tied=tied)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    _build_processor(family, tokenizer).save_pretrained(out)
    return out


def _build_model(
    family: TinyFamily,
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    num_layers: int,
    vision_size: int,
    vision_layers: int,
    max_positions: int,
    *,
    seed: int,
    tied: bool,
) -> PreTrainedModel:
    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    end, pad = token_id("<|im_end|>"), token_id("<|endoftext|>")
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": hidden_size // HEAD_SIZE // 2,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.05,
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    vision: dict[str, Any] = {"depth": vision_layers, "num_heads": vision_size // 32, "patch_size": PATCH_SIZE[family]}
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 6, 8]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if family == "qwen2_vl":
            text["rope_parameters"] = rope
            vision |= {"embed_dim": vision_size, "hidden_size": hidden_size, "mlp_ratio": 2}
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**common))
        elif family == "qwen2_5_vl":
            text["rope_parameters"] = rope
            vision |= {"hidden_size": vision_size, "intermediate_size": 2 * vision_size, "out_hidden_size": hidden_size}
            vision["fullatt_block_indexes"] = [vision_layers - 1]
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**common))
        else:
            del text["bos_token_id"], text["eos_token_id"]  # Qwen3-VL keeps them in the generation config only
            text |= {"head_dim": HEAD_SIZE}
            text["rope_parameters"] = rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
            vision |= {"hidden_size": vision_size, "intermediate_size": 2 * vision_size, "out_hidden_size": hidden_size}
            vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**common))
    model.generation_config = GenerationConfig(bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    return model


def _build_processor(
    family: TinyFamily, tokenizer: PreTrainedTokenizerFast
) -> Qwen2VLProcessor | Qwen2_5_VLProcessor | Qwen3VLProcessor:
    side = 2 * PATCH_SIZE[family]
    sizes: dict[str, Any] = {
        "patch_size": PATCH_SIZE[family],
        "merge_size": 2,
        "temporal_patch_size": 2,
        # Pixels of an image, or of one frame (Qwen3-VL: of the whole clip): 1 to 768 visual tokens.
        "size": {"shortest_edge": side * side, "longest_edge": 768 * side * side},
    }
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if family == "qwen3_vl":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        video = Qwen3VLVideoProcessor(**sizes, **half, do_sample_frames=False)
        return Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes, **half), tokenizer, video, chat_template=template)
    processor = Qwen2VLProcessor if family == "qwen2_vl" else Qwen2_5_VLProcessor
    video = Qwen2VLVideoProcessor(**sizes)
    return processor(Qwen2VLImageProcessor(**sizes), tokenizer, video, chat_template=template)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: build one model folder and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.models", description=build_tiny_model.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=get_args(TinyFamily), default="qwen2_vl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    args = parser.parse_args(argv)
    out = build_tiny_model(
        args.out, family=args.family, seed=args.seed, hidden_size=args.hidden_size, num_layers=args.num_layers
    )
    print(f"wrote a tiny {args.family} model to {out}")


if __name__ == "__main__":
    main()
