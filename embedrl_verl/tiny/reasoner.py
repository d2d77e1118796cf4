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

import numpy as np
import torch
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import PairRecord, Side
from embedrl_verl.embedder.patches import PatchSpec, patchify
from embedrl_verl.embedder.positions import mrope_positions
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import token_side

END = "<|im_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
# A cell is one visual token. The same limits hold for Reasoner and Embedder, here and in the recipe.
TINY_LIMITS = MediaLimits(token_side=token_side("qwen2_vl"), image_min_tokens=4, frame_min_tokens=4, max_frames=8)


@dataclass(frozen=True)
class Prompt:
    """One side of a pair that gets a T-CoT."""

    record: PairRecord
    side: Side


class Reasoner:
    """A tiny Qwen2-VL with its processor. Use `from_pretrained`."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> None:
        self.model = model
        self.processor = processor
        self._image_spec = PatchSpec.of(processor.image_processor)
        self._video_spec = PatchSpec.of(processor.video_processor)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Reasoner:
        """Load a Qwen2-VL folder in float32.

        Raises:
            ConfigError: weights are missing in the folder.
        """
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ConfigError(
                f"{path} must hold a complete Qwen2-VL checkpoint; {len(report['missing_keys'])} weights are missing: "
                "build it with embedrl_verl.tiny.models"
            )
        return cls(model.eval(), Qwen2VLProcessor.from_pretrained(path))

    def save(self, path: str | Path) -> None:
        """Write model and processor as one folder."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)

    def encode(self, prompt: Prompt, response: str = "") -> Encoded:
        """Token row of a prompt, followed by `response`.

        Raises:
            ConfigError: a prompt with more than one medium; the digits world has none.
        """
        messages = prompt_messages(
            prompt.record, prompt.side, family="qwen2_vl", style="compact", few_shot=False, max_frames=8
        )
        images, videos = load_prompt_media(messages, TINY_LIMITS, None)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + response
        media: dict[str, torch.Tensor] = {}
        spans: list[tuple[int, tuple[int, int, int], float]] = []
        if images or videos:
            if len(images or ()) + len(videos or ()) != 1:
                raise ConfigError(f"a prompt of the digits world must have at most one medium; got {prompt.record}")
            pad, pixels, (t, h, w) = self._patches(images, videos)
            name = "_videos" if videos else ""
            grid_key = "video_grid_thw" if videos else "image_grid_thw"
            media = {f"pixel_values{name}": pixels, grid_key: torch.tensor([[t, h, w]])}
            merge = self._image_spec.merge
            grid = (t, h // merge, w // merge)
            spans = [(len(self._ids(text[: text.index(pad)])), grid, 1.0)]
            text = text.replace(pad, pad * (grid[0] * grid[1] * grid[2]), 1)
        ids = self._ids(text)
        return Encoded(torch.tensor(ids), mrope_positions(len(ids), spans), media)

    def _patches(self, images: Any, videos: Any) -> tuple[str, torch.Tensor, tuple[int, int, int]]:
        if images:
            return IMAGE_PAD, *patchify(np.array(images[0])[None], self._image_spec)
        frames_TCHW, _ = videos[0]
        return VIDEO_PAD, *patchify(frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy(), self._video_spec)

    def _ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

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
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
            media = join_media(rows)
            sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
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
