# SPDX-License-Identifier: Apache-2.0
"""The tiny Reasoner outside verl: prompts exactly as the data set writes them, token rows, and generation.

Prompts go through `prompt_messages` and `load_prompt_media`, the same two calls that the RL data set and its agent loop
make, so that the cold start trains on the tokens that RL will sample from (a test compares them id by id).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import PairRecord, Side
from embedrl_verl.data.video import FrameTimes
from embedrl_verl.embedder.expand import PromptExpander
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.positions import time_steps_a_second
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import Family, family_of, token_side

END = "<|im_end|>"


def tiny_limits(family: Family) -> MediaLimits:
    """A cell of the digits world is one visual token. The same limits hold for Reasoner and Embedder, here and in the
    recipe."""
    return MediaLimits(token_side=token_side(family), image_min_tokens=4, frame_min_tokens=4, max_frames=8)


def family_of_folder(path: str | Path) -> Family:
    """Of a model's folder. Raises EmbedderError for one that is not supported."""
    return family_of_config(load_config(path))


@dataclass(frozen=True)
class Prompt:
    """One side of a pair that gets a T-CoT."""

    record: PairRecord
    side: Side


class Reasoner:
    """A tiny Qwen-VL model with its processor. Use `from_pretrained`."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.family = family_of(model.config.model_type)
        self.limits = tiny_limits(self.family)
        self._expander = PromptExpander(processor, self.family, time_steps_a_second(model.config))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Reasoner:
        """Load a folder of any of the families in float32.

        Raises:
            ConfigError: weights are missing in the folder, or another kind of model.
        """
        model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            raise ConfigError(
                f"{path} must hold a complete checkpoint; {len(report['missing_keys'])} weights are missing: "
                "build it with embedrl_verl.tiny.models"
            )
        return cls(model.eval(), AutoProcessor.from_pretrained(path))

    def save(self, path: str | Path) -> None:
        """Write model and processor as one folder."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)

    def encode(self, prompt: Prompt, response: str = "") -> Encoded:
        """Token row of a prompt, followed by `response`."""
        messages = prompt_messages(
            prompt.record, prompt.side, family=self.family, style="compact", few_shot=False, max_frames=8
        )
        images, videos = load_prompt_media(messages, self.limits, None)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + response
        clips = [
            (frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy(), FrameTimes.of(metadata))
            for frames_TCHW, metadata in videos or ()
        ]
        tokens, positions = self._expander.tokens(text, images or (), clips)
        return Encoded(tokens, positions, self._expander.pixels(images or (), clips))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], *, temperature: float = 0.0, max_new_tokens: int = 64, batch_size: int = 96
    ) -> list[str]:
        """T-CoTs of prompts, in their order; temperature 0 = greedy."""
        config, texts = self.model.config, []
        for start in range(0, len(prompts), batch_size):
            rows = [self.encode(prompt) for prompt in prompts[start : start + batch_size]]
            longest = max(len(row) for row in rows)
            ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id)
            for i, row in enumerate(rows):
                ids[i, longest - len(row) :] = row.input_ids
            # transformers' own positions of clips are others than the rollout's
            positions = torch.zeros(4, len(rows), longest, dtype=torch.int64)
            for i, row in enumerate(rows):
                positions[:, i, longest - len(row) :] = row.position_ids
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
            media = join_media(rows)
            sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                mm_token_type_ids=kinds,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                **media,
                **sampling,
            )
            texts += self.processor.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)
        return texts


def join_media(rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Patches and grids of several rows, concatenated by key."""
    keys = {key for row in rows for key in row.multi_modal_inputs}
    return {
        key: torch.cat([row.multi_modal_inputs[key] for row in rows if key in row.multi_modal_inputs]) for key in keys
    }
