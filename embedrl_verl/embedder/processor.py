# SPDX-License-Identifier: Apache-2.0
"""From an `EmbedInput` to the tensors that a model reads: `EmbedProcessor.encode`.

It needs no model, so the agent loop calls it while other rollouts still run. Sizes are decided once: media are fitted
by `embedrl_verl.data.media.fit_image` and never again. A prompt that is too long loses item text only; its media,
T-CoT, suffix and last token stay whole, or the row is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensordict import NonTensorData, NonTensorStack, TensorDict
from transformers import AutoProcessor

from embedrl_verl.data.media import MediaLimits, fit_image
from embedrl_verl.embedder.expand import Clip, PromptExpander
from embedrl_verl.embedder.loading import check_profile, family_of_config, load_config
from embedrl_verl.embedder.messages import (
    EmbedInput,
    build_messages,
    render_prompt,
)
from embedrl_verl.embedder.positions import time_steps_a_second
from embedrl_verl.embedder.profiles import EmbedderProfile, resolve_profile
from embedrl_verl.errors import EmbedderError
from embedrl_verl.families import Family, token_side

DEFAULT_TEXT_TOKENS = 480
"""Tokens of item text that are kept (method section 3)."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row for the model.

    Attributes:
        input_ids: int64 (L,), placeholders expanded; the last token is the one that is pooled.
        position_ids: int64 (4, L): text position, then M-RoPE time, height and width.
        multi_modal_inputs: `pixel_values` (patches, C) with `image_grid_thw` (images, 3) in patches, and
            `pixel_values_videos` with `video_grid_thw` (videos, 3); keys of absent media are absent.

    Raises:
        EmbedderError: shapes or dtypes other than these.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    multi_modal_inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids, positions = self.input_ids, self.position_ids
        if ids.dim() != 1 or not len(ids) or ids.dtype != torch.int64:
            raise EmbedderError(f"input_ids must be int64 (L,), L >= 1; got {ids.dtype} {tuple(ids.shape)}")
        if positions.shape != (4, len(ids)) or positions.dtype != torch.int64:
            raise EmbedderError(
                f"position_ids must be int64 (4, {len(ids)}); got {positions.dtype} {tuple(positions.shape)}"
            )
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            has_grid = grid in self.multi_modal_inputs
            patches = int(self.multi_modal_inputs[grid].prod(dim=1).sum()) if has_grid else 0
            have = len(self.multi_modal_inputs[pixels]) if pixels in self.multi_modal_inputs else 0
            if patches != have:
                raise EmbedderError(f"{grid} stands for {patches} patches, {pixels} has {have}; encode the row again")

    def __len__(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    def to_tensordict(self) -> TensorDict:
        """A batch of this one row, as TransferQueue stores it."""
        return TensorDict(
            {
                "input_ids": self.input_ids[None],
                "position_ids": self.position_ids[None],
                "multi_modal_inputs": NonTensorStack(NonTensorData(self.multi_modal_inputs)),
            },
            batch_size=[1],
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a pooling server is given: the prompt with one placeholder a medium, and the fitted media in order.

    Attributes:
        images: at the size at which the model reads them.
        videos: per video uint8 (T, height, width, 3) and when its T frames stand in the clip.
        messages: what the prompt was rendered from; media parts hold the same fitted images and frames.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    videos: tuple[Clip, ...]
    messages: tuple[dict[str, Any], ...]


class EmbedProcessor:
    """Turns inputs into `Encoded` rows for one checkpoint and profile."""

    def __init__(
        self,
        processor: Any,
        family: Family,
        profile: EmbedderProfile,
        limits: MediaLimits,
        *,
        max_length: int,
        max_text_tokens: int = DEFAULT_TEXT_TOKENS,
        tokens_per_second: float = 1.0,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Use `from_pretrained`.

        Args:
            processor: the checkpoint's Hugging Face processor.
            max_length: longest prompt in tokens.
            max_text_tokens: tokens of item text that are kept.
            tokens_per_second: time axis of videos (Qwen2.5-VL).
            pixel_dtype: dtype of stored pixels; the model's own dtype loses nothing, since the model casts to it first.
        """
        self.profile = profile
        self.limits = limits
        self.max_length = max_length
        self.max_text_tokens = max_text_tokens
        self.tokenizer = processor.tokenizer
        self.family = family
        self._expander = PromptExpander(processor, family, tokens_per_second)
        self._pixel_dtype = pixel_dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        profile: str | EmbedderProfile = "auto",
        limits: MediaLimits | None = None,
        *,
        max_text_tokens: int = DEFAULT_TEXT_TOKENS,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> EmbedProcessor:
        """Load the tokenizer and image processor of a checkpoint; no weights.

        Args:
            path: folder or hub id.
            profile: a profile, its name, or "auto".
            limits: sizes of media; None = those of the profile.

        Raises:
            EmbedderError: the checkpoint and the profile do not fit; limits with another token side than the family's.
        """
        config = load_config(path)
        chosen = resolve_profile(path, profile) if isinstance(profile, str) else profile
        check_profile(path, config, chosen)
        family = family_of_config(config)
        side = token_side(family)
        if limits is None:
            (image_min, image_max), (frame_min, frame_max) = chosen.image_tokens, chosen.frame_tokens
            limits = MediaLimits(side, image_min, image_max, frame_min, frame_max)
        if limits.token_side != side:
            raise EmbedderError(f"{path}: limits.token_side must be {side} px for {family}; got {limits.token_side}")
        positions = config.get_text_config().max_position_embeddings
        return cls(
            AutoProcessor.from_pretrained(path, trust_remote_code=False),
            family,
            chosen,
            limits,
            max_length=min(positions, chosen.max_length or positions),
            max_text_tokens=max_text_tokens,
            tokens_per_second=time_steps_a_second(config),
            pixel_dtype=pixel_dtype,
        )

    def prepare(self, inputs: EmbedInput) -> Prepared:
        """The prompt and fitted media of an input; item text is cut at `max_text_tokens`.

        Raises:
            MediaError: a medium with impossible sides.
        """
        return self._prepare(inputs, self.max_text_tokens)

    def prompt_text(self, inputs: EmbedInput) -> str:
        """The prompt string alone."""
        return self.prepare(inputs).prompt

    def encode(self, inputs: EmbedInput) -> Encoded:
        """The row of one input.

        Raises:
            MediaError: a medium with impossible sides.
            EmbedderError: too long even without any item text.
        """
        prepared, tokens, positions = self.fit(inputs)
        pixels = self._expander.pixels(prepared.images, prepared.videos, self._pixel_dtype)
        return Encoded(tokens, positions, pixels)

    def fit(self, inputs: EmbedInput) -> tuple[Prepared, torch.Tensor, torch.Tensor]:
        """What `encode` encodes, without pixels.

        Returns:
            Prompt and fitted media, input_ids int64 (L,) and position_ids int64 (4, L), L at most `max_length`.

        Raises:
            MediaError, EmbedderError: as `encode`.
        """
        prepared = self._prepare(inputs, self.max_text_tokens)
        tokens, positions = self._expand(prepared)
        excess = len(tokens) - self.max_length
        if excess <= 0:
            return prepared, tokens, positions
        text_tokens = min(self._count(inputs.item.text), self.max_text_tokens)
        if text_tokens > excess:
            # One token of slack: a cut can change how the tokens around it merge.
            prepared = self._prepare(inputs, text_tokens - excess - 1)
            tokens, positions = self._expand(prepared)
        if len(tokens) > self.max_length:
            raise EmbedderError(
                f"the prompt must have at most {self.max_length} tokens; it has {len(tokens)}, and only {text_tokens} "
                "tokens of item text may be cut. Lower the media limits, the evidence images or the response length"
            )
        return prepared, tokens, positions

    def _prepare(self, inputs: EmbedInput, text_tokens: int) -> Prepared:
        item = replace(inputs.item, text=cut_text(self.tokenizer, inputs.item.text, text_tokens))
        messages = build_messages(item, inputs.tcot, inputs.evidence, profile=self.profile)
        images: list[Image.Image] = []
        videos: list[Clip] = []
        for part in (part for message in messages for part in message["content"]):
            if part["type"] == "image":
                part["image"] = fit_image(part["image"], self.limits)
                images.append(part["image"])
            elif part["type"] == "video":
                part["video"] = self._fit_frames(part["video"])
                videos.append((part["video"], part["times"].padded(len(part["video"]))))
        prompt = render_prompt(messages, chat=self.profile.chat)
        return Prepared(prompt, tuple(images), tuple(videos), tuple(messages))

    def _fit_frames(self, frames: list[Image.Image]) -> np.ndarray:
        """uint8 (T, height, width, 3), T even: frames at the first one's fitted size, the last repeated if T is odd."""
        first = fit_image(frames[0], self.limits, is_frame=True)
        fitted = [first]
        for frame in frames[1:]:
            other = fit_image(frame, self.limits, is_frame=True)
            fitted.append(other if other.size == first.size else other.resize(first.size, Image.Resampling.BICUBIC))
        if len(fitted) % 2:
            fitted.append(fitted[-1])
        return np.stack([np.asarray(frame) for frame in fitted])

    def _expand(self, prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        return self._expander.tokens(prepared.prompt, prepared.images, prepared.videos)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def cut_text(tokenizer: Any, text: str, limit: int) -> str:
    """The longest start of `text` that has at most `limit` tokens; `tokenizer` is a fast one."""
    if len(text.encode()) <= limit:  # a token has at least one byte
        return text
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= limit else text[: offsets[limit][0]]
