# SPDX-License-Identifier: Apache-2.0
"""From a prompt with one placeholder a medium, and fitted media, to token ids, M-RoPE positions and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from embedrl_verl.data.video import FrameTimes
from embedrl_verl.embedder.messages import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from embedrl_verl.embedder.patches import PatchSpec, patchify
from embedrl_verl.embedder.positions import Grid, clip_media, mrope_positions
from embedrl_verl.families import Family, facts_of

Clip = tuple[np.ndarray, FrameTimes]
"""uint8 (T, height, width, 3), T even, and when its T frames stand in the clip."""


class PromptExpander:
    """For one checkpoint's tokenizer and patches."""

    def __init__(self, processor: Any, family: Family, tokens_per_second: float = 1.0) -> None:
        """`processor`: the checkpoint's of Hugging Face. `tokens_per_second`: time axis of videos (Qwen2.5-VL)."""
        self._family, self._clip_time = family, facts_of(family).clip_time
        self._tokenizer = processor.tokenizer
        self._image_spec = PatchSpec.of(processor.image_processor)
        self._video_spec = PatchSpec.of(processor.video_processor)
        self._tokens_per_second = tokens_per_second
        self._image_id = self._tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._video_id = self._tokenizer.convert_tokens_to_ids(VIDEO_PAD)

    def tokens(
        self, prompt: str, images: Sequence[Image.Image], videos: Sequence[Clip]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 (L,) and positions int64 (4, L), each placeholder repeated as often as its medium has merged
        tokens; media in reading order."""
        patch_frames = self._video_spec.frames
        grids: list[Grid] = [(1, *_merged(image.height, image.width, self._image_spec)) for image in images]
        clips: list[Grid] = [
            (len(frames) // patch_frames, *_merged(frames.shape[1], frames.shape[2], self._video_spec))
            for frames, _ in videos
        ]
        times = [clip for _, clip in videos]
        steps = [self._tokens_per_second * self._seconds(clip, patch_frames) for clip in times]
        queues = {
            self._image_id: iter([(grid, 1.0) for grid in grids]),
            self._video_id: iter(clip_media(self._family, clips, steps)),
        }
        if self._clip_time == "stamps":
            first, *others = prompt.split(f"{VISION_START}{VIDEO_PAD}{VISION_END}")
            stamps = [_time_stamps(clip.seconds, patch_frames) for clip in times]
            prompt = first + "".join(stamp + text for stamp, text in zip(stamps, others, strict=True))
        tokens: list[int] = []
        media: list[tuple[int, Grid, float]] = []
        for token in self._tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            if token not in queues:
                tokens.append(token)
                continue
            grid, step = next(queues[token])
            media.append((len(tokens), grid, step))
            tokens += [token] * (grid[0] * grid[1] * grid[2])
        return torch.tensor(tokens), mrope_positions(len(tokens), media)

    def pixels(
        self, images: Sequence[Image.Image], videos: Sequence[Clip], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Patches and grids as the model takes them; keys of absent media are absent."""
        found: dict[str, torch.Tensor] = {}
        for media, spec, name, grid in (
            ([np.asarray(image)[None] for image in images], self._image_spec, "pixel_values", "image_grid_thw"),
            ([frames for frames, _ in videos], self._video_spec, "pixel_values_videos", "video_grid_thw"),
        ):
            if media:
                patches = [patchify(frames, spec) for frames in media]
                found[name] = torch.cat([values for values, _ in patches]).to(dtype)
                found[grid] = torch.tensor([shape for _, shape in patches])
        return found

    def _seconds(self, clip: FrameTimes, patch_frames: int) -> float:
        """Between temporal patches of a clip; 1.0 where patches are counted."""
        if self._clip_time != "seconds":
            return 1.0
        # transformers and vLLM keep it in float32, and positions are cut to integers after that
        return float(np.float32(patch_frames / clip.fps))


def _time_stamps(seconds: Sequence[float], patch_frames: int) -> str:
    """The text of a clip: before each temporal patch the mean time of its first and last frame."""
    firsts, lasts = seconds[::patch_frames], seconds[patch_frames - 1 :: patch_frames]
    means = [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]
    return "".join(f"<{second:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for second in means)


def _merged(height: int, width: int, spec: PatchSpec) -> tuple[int, int]:
    """Rows and columns of merged tokens of an image of that size in pixels."""
    side = spec.patch * spec.merge
    return height // side, width // side
