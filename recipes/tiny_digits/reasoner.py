# SPDX-License-Identifier: Apache-2.0
"""The tiny Reasoner outside verl: prompts exactly as the data set writes them, token rows, and generation.

Prompts go through `prompt_messages` and `load_prompt_media`, the two calls that the RL data set and its agent loop
make, so that the cold start trains on the tokens that RL will sample from (a test compares them id by id).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import PairRecord, Side
from embedrl_verl.data.video import FrameTimes
from embedrl_verl.embedder.batching import pad_rows
from embedrl_verl.embedder.expand import PromptExpander
from embedrl_verl.embedder.positions import time_steps_a_second
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family, family_of, token_side

BATCH_SIZE = 96


def tiny_limits(family: Family) -> MediaLimits:
    """A cell of the digits world is one visual token. Reasoner and Embedder have the same limits, here and in the
    recipe."""
    return MediaLimits(token_side=token_side(family), image_min_tokens=4, frame_min_tokens=4, max_frames=8)


class Prompt(NamedTuple):
    """One side of a pair that gets a T-CoT."""

    record: PairRecord
    side: Side


class Reasoner:
    """A tiny Qwen-VL model, a complete folder of any family, in float32, with its processor."""

    def __init__(self, path: str | Path) -> None:
        model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        if missing := report["missing_keys"]:
            raise ConfigError(
                f"{path} must hold a complete checkpoint; {len(missing)} weights are missing: build it again"
            )
        self.model: PreTrainedModel = model.eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
        self.family = family_of(self.model.config.model_type)
        self.limits = tiny_limits(self.family)
        self._expander = PromptExpander(self.processor, self.family, time_steps_a_second(self.model.config))

    def save(self, path: str | Path) -> None:
        """Write model and processor as one folder."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)

    def encode(self, prompt: Prompt, response: str = "") -> Encoded:
        """Token row of a prompt, followed by `response`."""
        messages = prompt_messages(*prompt, family=self.family, style="compact", few_shot=False, max_frames=8)
        images, videos = load_prompt_media(messages, self.limits, None)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + response
        clips = [
            (frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy(), FrameTimes.of(metadata))
            for frames_TCHW, metadata in videos or ()
        ]
        tokens, positions = self._expander.tokens(text, images or (), clips)
        return Encoded(tokens, positions, self._expander.pixels(images or (), clips))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[str]:
        """Greedy T-CoTs of prompts, in their order."""
        config, tokenizer, texts = self.model.config, self.processor.tokenizer, []
        for start in range(0, len(prompts), BATCH_SIZE):
            rows = [self.encode(prompt) for prompt in prompts[start : start + BATCH_SIZE]]
            ids = _pad_left([row.input_ids for row in rows], tokenizer.pad_token_id)
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=_pad_left([torch.ones_like(row.input_ids) for row in rows]),
                # transformers' own positions of clips are others than the rollout's
                position_ids=_pad_left([row.position_ids.T for row in rows]).permute(2, 0, 1),
                mm_token_type_ids=(ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long(),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **pad_rows(rows).media,
            )
            texts += tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
        return texts


def _pad_left(rows: Sequence[torch.Tensor], value: int = 0) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
