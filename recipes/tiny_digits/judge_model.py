# SPDX-License-Identifier: Apache-2.0
"""The tiny judges' model: a Qwen2 with the tiny tokenizer, in a folder that vLLM serves like a released checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from recipes.tiny_digits.models import CHAT_TEMPLATE, END, HEAD_SIZE, PAD, build_tokenizer, padded_vocabulary

IGNORED = -100
ROPE_THETA = 1e4
HIDDEN_SIZE = 128
# How many tokens back the heads of the first and the second layer look at the start.
LOOK_BACK = ((1, 2, 3, 4), (1, 2, 5, 6))
Lesson: TypeAlias = tuple[list[int], list[int]]
"""Tokens, and for each the token that it has to predict, or IGNORED."""


class TinyJudge:
    """Model and tokenizer; the chat template is the tiny Reasoner's."""

    def __init__(self, layers: int = 4, *, seed: int = 0) -> None:
        self.tokenizer = build_tokenizer(with_emb_token=False)
        self.tokenizer.chat_template = CHAT_TEMPLATE
        end, self._pad = self.tokenizer.convert_tokens_to_ids([END, PAD])
        config = Qwen2Config(
            vocab_size=padded_vocabulary(self.tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=2 * HIDDEN_SIZE,
            num_hidden_layers=layers,
            num_attention_heads=HIDDEN_SIZE // HEAD_SIZE,
            num_key_value_heads=HIDDEN_SIZE // HEAD_SIZE,
            max_position_embeddings=4096,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=self._pad,
            eos_token_id=end,
            pad_token_id=self._pad,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Qwen2ForCausalLM(config)
        ids = {"bos_token_id": self._pad, "eos_token_id": [end, self._pad], "pad_token_id": self._pad}
        self.model.generation_config = GenerationConfig(**ids)
        self.look_back(LOOK_BACK)

    def look_back(self, offsets_of_layers: Sequence[Sequence[int]]) -> None:
        """Start the heads of the first layers so; see `start_looking_back`."""
        for layer, offsets in zip(self.model.model.layers, offsets_of_layers, strict=False):
            start_looking_back(layer.self_attn, offsets)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def turn(self, content: str) -> tuple[list[int], list[int]]:
        """A user's turn, as the server writes it: up to the end of its content, and on to where the answer begins."""
        message = [{"role": "user", "content": content}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        cut = text.index(content) + len(content)
        return self.ids(text[:cut]), self.ids(text[cut:])

    def loss(self, lessons: Sequence[Lesson]) -> tuple[Tensor, float]:
        """Mean cross-entropy over all labels, and the share of them that is the likeliest token."""
        self.model.train()
        longest = max(len(ids) for ids, _ in lessons)
        tokens = torch.tensor([ids + [self._pad] * (longest - len(ids)) for ids, _ in lessons])
        labels = torch.tensor([wanted + [IGNORED] * (longest - len(wanted)) for _, wanted in lessons])
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
        prompt = opened + closed
        output = self.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        return str(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Write a Hugging Face folder."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


@torch.no_grad()
def start_looking_back(attention: Any, offsets: Sequence[int], *, gap: float = 5.0) -> None:
    """Start the heads of a Qwen2 attention so that head i looks mostly `offsets[i]` tokens back.

    Query and key biases do it: the key's is the query's, turned by the rotation that RoPE gives to `offset` positions,
    so that the two meet at that distance. Only the fast pairs are used, which tell neighbours apart. `gap`: by how
    much, before the softmax, a neighbour of that place is lower.
    """
    half = HEAD_SIZE // 2
    speed = ROPE_THETA ** (-torch.arange(half) / half)
    fast = speed > 0.15
    bias = torch.zeros(HEAD_SIZE)
    bias[:half][fast] = (gap * HEAD_SIZE**0.5 / (1 - speed[fast].cos()).sum()).sqrt()
    first, second = bias[:half], bias[half:]
    for head, offset in enumerate(offsets):
        place = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        cosine, sine = (offset * speed).cos(), (offset * speed).sin()
        attention.q_proj.bias[place] = bias
        attention.k_proj.bias[place] = torch.cat([first * cosine - second * sine, second * cosine + first * sine])
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[place] *= 0.2  # at the start what stands there matters less than where it stands
