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

from embedrl_verl.config.schema import EmbedderConfig, MediaConfig
from embedrl_verl.data.media import MediaLimits, fit_image
from embedrl_verl.embedder.expand import Clip, PromptExpander
from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.embedder.messages import EmbedInput, build_messages, render_prompt
from embedrl_verl.embedder.positions import time_steps_a_second
from embedrl_verl.embedder.profiles import EmbedderProfile, fitting_profile
from embedrl_verl.errors import EmbedderError
from embedrl_verl.families import Family, token_side

DEFAULT_TEXT_TOKENS = 480
"""Tokens of item text that are kept (method section 3)."""
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row for the model.

    Attributes:
        input_ids: int64 (L,), placeholders expanded; the last token is the one that is pooled.
        position_ids: int64 (4, L): text position, then M-RoPE time, height and width.
        multi_modal_inputs: `pixel_values` (patches, C) with `image_grid_thw` (images, 3) in patches, and
            `pixel_values_videos` with `video_grid_thw` (videos, 3); keys of absent media are absent.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    multi_modal_inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids, positions, media = self.input_ids, self.position_ids, self.multi_modal_inputs
        if ids.dim() != 1 or not len(ids) or ids.dtype != torch.int64:
            raise EmbedderError(f"input_ids must be int64 (L,), L >= 1; got {ids.dtype} {tuple(ids.shape)}")
        if positions.shape != (4, len(ids)) or positions.dtype != torch.int64:
            raise EmbedderError(
                f"position_ids must be int64 (4, {len(ids)}); got {positions.dtype} {tuple(positions.shape)}"
            )
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            patches = int(media[grid].prod(dim=1).sum()) if grid in media else 0
            have = len(media[pixels]) if pixels in media else 0
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
    """What a pooling server is given: the prompt with one placeholder a medium, and the fitted media in order."""

    prompt: str
    images: tuple[Image.Image, ...]  # at the size at which the model reads them
    videos: tuple[Clip, ...]
    messages: tuple[dict[str, Any], ...]  # of the prompt; media parts hold the same fitted images and frames


@dataclass(eq=False)
class EmbedProcessor:
    """Turns inputs into `Encoded` rows for one checkpoint and profile. Use `from_pretrained`."""

    tokenizer: Any
    family: Family
    profile: EmbedderProfile
    limits: MediaLimits
    expander: PromptExpander
    max_length: int  # longest prompt in tokens
    max_text_tokens: int  # tokens of item text that are kept
    pixel_dtype: torch.dtype  # the model's own loses nothing, since the model casts to it first

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
            limits: None = those of the profile.
        """
        profile = fitting_profile(path, profile)
        config = load_config(path)
        family = family_of_config(config)
        side = token_side(family)
        if limits is None:
            limits = MediaLimits(side, *profile.image_tokens, *profile.frame_tokens)
        if limits.token_side != side:
            raise EmbedderError(f"{path}: limits.token_side must be {side} px for {family}; got {limits.token_side}")
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        longest = config.get_text_config().max_position_embeddings
        return cls(
            tokenizer=processor.tokenizer,
            family=family,
            profile=profile,
            limits=limits,
            expander=PromptExpander(processor, family, time_steps_a_second(config)),
            max_length=min(longest, profile.max_length or longest),
            max_text_tokens=max_text_tokens,
            pixel_dtype=pixel_dtype,
        )

    def prepare(self, inputs: EmbedInput) -> Prepared:
        """The prompt and fitted media of an input; item text is cut at `max_text_tokens`."""
        return self._prepare(inputs, self.max_text_tokens)

    def prompt_text(self, inputs: EmbedInput) -> str:
        """The prompt string alone."""
        return self.prepare(inputs).prompt

    def encode(self, inputs: EmbedInput) -> Encoded:
        """The row of one input; MediaError for a medium with impossible sides, EmbedderError if it is too long."""
        prepared, tokens, positions = self.fit(inputs)
        return Encoded(tokens, positions, self.expander.pixels(prepared.images, prepared.videos, self.pixel_dtype))

    def fit(self, inputs: EmbedInput) -> tuple[Prepared, torch.Tensor, torch.Tensor]:
        """What `encode` encodes, without pixels: prompt and fitted media, input_ids int64 (L,) and position_ids int64
        (4, L), L at most `max_length`."""
        prepared = self.prepare(inputs)
        tokens, positions = self._expand(prepared)
        excess = len(tokens) - self.max_length
        if excess <= 0:
            return prepared, tokens, positions
        text_tokens = len(self.tokenizer(inputs.item.text, add_special_tokens=False)["input_ids"])
        text_tokens = min(text_tokens, self.max_text_tokens)
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
        fitted = [fit_image(frame, self.limits, is_frame=True) for frame in frames]
        size = fitted[0].size
        fitted = [one if one.size == size else one.resize(size, Image.Resampling.BICUBIC) for one in fitted]
        return np.stack([np.asarray(one) for one in fitted + fitted[-1:] * (len(fitted) % 2)])

    def _expand(self, prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        return self.expander.tokens(prepared.prompt, prepared.images, prepared.videos)


def cut_text(tokenizer: Any, text: str, limit: int) -> str:
    """The longest start of `text` that has at most `limit` tokens; `tokenizer` is a fast one."""
    if len(text.encode()) <= limit:  # a token has at least one byte
        return text
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= limit else text[: offsets[limit][0]]


def processor_for(config: EmbedderConfig, *, max_frames: int | None = None) -> EmbedProcessor:
    """The processor that encodes rows for the Embedder of the section; `max_frames` None: the default of the data."""
    side = token_side(family_of_config(load_config(config.path)))
    frames = MediaConfig().max_frames if max_frames is None else max_frames
    return EmbedProcessor.from_pretrained(
        config.path,
        config.profile,
        MediaLimits.of(config, side, frames),
        max_text_tokens=config.max_text_tokens,
        pixel_dtype=DTYPES[config.dtype],
    )
