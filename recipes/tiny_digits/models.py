# SPDX-License-Identifier: Apache-2.0
"""Complete tiny Hugging Face models of the three Qwen-VL families, made on the spot with random weights.

`build_tiny_model` writes a folder that transformers, vLLM (CPU and GPU) and verl load like a released checkpoint. About
0.8 million parameters with the defaults. Three constraints shape the sizes:

- vLLM's CPU attention wants a head size of 32 or 64 (16 fails at the first forward), so heads = hidden_size / 32;
- the three sections of M-RoPE must sum to half the head size;
- the output matrix is not tied to the input embedding, as in the models of 7B and more; `tied` makes one as the smaller
  ones have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import FAMILIES, Family, facts_of, token_side

HEAD_SIZE = 32
# With the usual 1e4 or 1e6 the axes of an image get wavelengths of hundreds of tokens, and a model of two layers cannot
# tell neighbouring columns apart. Its sequences are about a hundred tokens long: 16 pairs from wavelength 6 to 100.
ROPE_THETA = 20.0
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
END, PAD = "<|im_end|>", "<|endoftext|>"
CONTROL_TOKENS = (PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Ordinary (not special) tokens: they survive `skip_special_tokens=True`, so the parser sees them. With them a T-CoT of
# the digits world takes 30 to 40 tokens.
TCOT_TOKENS = (
    *("<thinking>", "</thinking>", "<rethink>", "</rethink>", "<answer>", "</answer>"),
    *('{"bbox_2d":', '{"key_frames":', '{"text_keywords":'),
)
# Letters with an optional leading mark or space; one digit; runs of marks; white space.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    "system user assistant Query Candidate Target target query candidate text image images picture page document video "
    "frame frames clip canvas digits digit numbers number read all the in of a an at is are and with from to for on by "
    "find Find Read Which which What what that shows show contains line printed left right upper lower first last top "
    "bottom middle row order reads bbox none yes no not it its this these ok checked seen here box boxes keywords "
    "key frames evidence relative absolute pixels units write Write give Give answer thinking rethink JSON then tags "
    "Summarize the above content one word Represent given retrieve matching corresponds question Question instruction "
    "second third fourth fifth sixth count how many odd even largest smallest after before between "
    "parcel ticket receipt invoice locker report voucher permit"
)
_MARKS = ('":', '"]}', "]}", '"}', '","', '", "', "[[", "]]", "],[", "], [", '["', " [", " {", ":\n", ".\n")


def build_tokenizer(*, with_emb_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens from a fixed word list; the same tokens and ids on every call.

    The 256 byte tokens make every text encodable and every round trip exact. Digits are one token each, so that a box
    of four numbers costs as many tokens as it has digits. `with_emb_token` adds the special token `<emb>`, at whose
    position an Embedder is read out.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    corpus = [form for word in _WORDS.split() for form in (word, " " + word)] + list(_MARKS)
    tokenizer.train_from_iterator([piece for piece in corpus for _ in range(2)], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TCOT_TOKENS])
    special = CONTROL_TOKENS + (("<emb>",) if with_emb_token else ())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(special),
    )


def build_tiny_model(
    out_dir: str | Path,
    *,
    family: Family = "qwen2_vl",
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
        out_dir: made if missing; files of the same name are overwritten.
        seed: of the random weights; torch's global random state is left as it was.
        hidden_size: width of the language part, a multiple of 64 (2 query heads a key-value head, head size 32).
        vision_size: width of the vision part, a multiple of 32.
        vision_layers: the last one attends over the whole image.
        max_positions: longest sequence in tokens.
        with_emb_token: an Embedder needs it, a Reasoner ignores it.
        tied: the output matrix is the input embedding.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family must be one of {FAMILIES}; got {family!r}")
    if hidden_size % 64 or vision_size % 32 or min(hidden_size, num_layers, vision_size, vision_layers) < 1:
        raise ConfigError(
            "hidden_size must be a positive multiple of 64, vision_size of 32, and both parts need a layer; "
            f"got {hidden_size}, {vision_size} and {num_layers}, {vision_layers} layers"
        )
    tokenizer = build_tokenizer(with_emb_token=with_emb_token)
    tokenizer.model_max_length = max_positions
    text, vision = _sizes(family, hidden_size, num_layers, vision_size, vision_layers)
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    text |= {"vocab_size": padded_vocabulary(tokenizer), "max_position_embeddings": max_positions, "pad_token_id": pad}
    if family != "qwen3_vl":  # which keeps them in the generation config only
        text |= {"bos_token_id": pad, "eos_token_id": end}
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    tokens = {f"{name}_id": number for name, number in zip(names, ids, strict=True)}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    out = Path(out_dir)
    model.save_pretrained(out)
    _build_processor(family, tokenizer).save_pretrained(out)
    return out


def padded_vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding: all tokens, rounded up to a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


def _sizes(
    family: Family, hidden_size: int, num_layers: int, vision_size: int, vision_layers: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text and the vision configuration, without tokens."""
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 6, 8]}
    text: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // HEAD_SIZE,
        "num_key_value_heads": hidden_size // HEAD_SIZE // 2,
        "initializer_range": 0.05,
        "rope_parameters": rope,
    }
    vision = {"depth": vision_layers, "num_heads": vision_size // 32, "patch_size": token_side(family) // 2}
    if family == "qwen2_vl":
        return text, vision | {"embed_dim": vision_size, "hidden_size": hidden_size, "mlp_ratio": 2}
    vision |= {"hidden_size": vision_size, "intermediate_size": 2 * vision_size, "out_hidden_size": hidden_size}
    if family == "qwen2_5_vl":
        return text, vision | {"fullatt_block_indexes": [vision_layers - 1]}
    text |= {"head_dim": HEAD_SIZE, "rope_parameters": rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
    return text, vision | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}


def _build_processor(family: Family, tokenizer: PreTrainedTokenizerFast) -> Any:
    side = token_side(family)
    sizes: dict[str, Any] = {
        "patch_size": side // 2,
        "merge_size": 2,
        "temporal_patch_size": 2,
        # Pixels of an image, or of one frame (Qwen3-VL: of the whole clip): 1 to 768 visual tokens.
        "size": {"shortest_edge": side * side, "longest_edge": 768 * side * side},
    }
    if family == "qwen3_vl":
        sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        video = Qwen3VLVideoProcessor(**sizes, do_sample_frames=False)
    else:
        video = Qwen2VLVideoProcessor(**sizes)
    processor = getattr(transformers, facts_of(family).processor)
    return processor(Qwen2VLImageProcessor(**sizes), tokenizer, video, chat_template=CHAT_TEMPLATE)


def main(out: Path, family: Family = "qwen2_vl", seed: int = 0) -> None:
    """Write a tiny model to the folder OUT."""
    print(f"wrote a tiny {family} model to {build_tiny_model(out, family=family, seed=seed)}")


if __name__ == "__main__":
    typer.run(main)
