# SPDX-License-Identifier: Apache-2.0
"""The tiny judge's model: a Qwen2 with the tiny tokenizer, in a folder that vLLM serves like a released checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from embedrl_verl.errors import ConfigError
from embedrl_verl.tiny.models import CHAT_TEMPLATE, HEAD_SIZE
from embedrl_verl.tiny.tokenizer import build_tokenizer

END = "<|im_end|>"
IGNORED = -100
ROPE_THETA = 1e4
# How many tokens back the heads of the first and the second layer look at the start.
LOOK_BACK = ((1, 2, 3, 4), (1, 2, 5, 6))


@dataclass(frozen=True)
class JudgeSize:
    """Width (a multiple of 128, four heads of 32 or more) and layers (2 or more) of the model."""

    hidden_size: int = 128
    layers: int = 4

    def __post_init__(self) -> None:
        if self.hidden_size < 128 or self.hidden_size % 128 or self.layers < 2:
            raise ConfigError(f"a judge needs a hidden_size that is a multiple of 128 and 2 layers or more; got {self}")


class TinyJudge:
    """Model and tokenizer; the chat template is the tiny Reasoner's."""

    def __init__(self, size: JudgeSize, *, seed: int = 0) -> None:
        self.tokenizer = build_tokenizer(with_emb_token=False)
        self.tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        self._pad = int(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        end = int(self.tokenizer.convert_tokens_to_ids(END))
        heads = size.hidden_size // HEAD_SIZE
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=-(-len(self.tokenizer) // 64) * 64,
                    hidden_size=size.hidden_size,
                    intermediate_size=2 * size.hidden_size,
                    num_hidden_layers=size.layers,
                    num_attention_heads=heads,
                    num_key_value_heads=heads,
                    max_position_embeddings=4096,
                    initializer_range=0.05,
                    rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
                    bos_token_id=self._pad,
                    eos_token_id=end,
                    pad_token_id=self._pad,
                )
            )
        self.model.generation_config = GenerationConfig(
            bos_token_id=self._pad, eos_token_id=[end, self._pad], pad_token_id=self._pad
        )
        for layer, offsets in enumerate(LOOK_BACK):
            look_back(self.model.model.layers[layer].self_attn, offsets)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def turn(self, content: str) -> tuple[list[int], list[int]]:
        """A user's turn, as the server writes it: up to the end of its content, and on to where the answer begins."""
        message = [{"role": "user", "content": content}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        cut = text.index(content) + len(content)
        return self.ids(text[:cut]), self.ids(text[cut:])

    def loss(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, float]:
        """Mean cross-entropy over all labels, and the share of them that is the likeliest token."""
        self.model.train()
        longest = max(len(ids) for ids, _ in rows)
        tokens, labels = torch.full((2, len(rows), longest), self._pad)
        labels = torch.full_like(labels, IGNORED)
        for i, (ids, wanted) in enumerate(rows):
            tokens[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(wanted)] = torch.tensor(wanted)
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        known = labels != IGNORED
        logits = self.model.lm_head(hidden[known])
        right = (logits.argmax(dim=1) == labels[known]).float().mean().item()
        return functional.cross_entropy(logits, labels[known]), right

    @torch.no_grad()
    def answer(self, question: str) -> str:
        """What it says to one user's turn, decoded greedily."""
        self.model.eval()
        opened, closed = self.turn(question)
        output = self.model.generate(input_ids=torch.tensor([opened + closed]), max_new_tokens=4, do_sample=False)
        return str(self.tokenizer.decode(output[0, len(opened) + len(closed) :], skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Write a Hugging Face folder."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


@torch.no_grad()
def look_back(attention: Any, offsets: Sequence[int], *, gap: float = 5.0) -> None:
    """Start the heads of a Qwen2 attention so that each looks mostly `offset` tokens back.

    Query and key biases do it: the key's is the query's, turned by the rotation that RoPE gives to `offset` positions,
    so that the two meet at that distance; only the fast pairs are used, which tell neighbours apart.

    Args:
        attention: with biases on queries and keys, as many key-value heads as query heads.
        offsets: of the first heads.
        gap: by how much, before the softmax, a neighbour of that place is lower.
    """
    half = HEAD_SIZE // 2
    speed = ROPE_THETA ** (-torch.arange(half) / half)
    fast = speed > 0.15
    bias = torch.zeros(HEAD_SIZE)
    bias[:half][fast] = (gap * HEAD_SIZE**0.5 / (1 - speed[fast].cos()).sum()).sqrt()
    for head, offset in enumerate(offsets):
        place = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        cosine, sine = (offset * speed).cos(), (offset * speed).sin()
        first, second = bias[:half], bias[half:]
        attention.q_proj.bias[place] = bias
        attention.k_proj.bias[place] = torch.cat([first * cosine - second * sine, second * cosine + first * sine])
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[place] *= 0.2  # at the start what stands there matters less than where it stands
