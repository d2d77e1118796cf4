# SPDX-License-Identifier: Apache-2.0
"""From a prompt with one placeholder a medium, and fitted media, to token ids, M-RoPE positions and patches.

Pixels are bit for bit what the checkpoints' own image and video processors give (tests compare the three families), in
less than half the time: bytes are moved before they become floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from embedrl_verl.data.video import FrameTimes
from embedrl_verl.embedder.messages import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from embedrl_verl.embedder.positions import Grid, clip_media, mrope_positions
from embedrl_verl.errors import EmbedderError
from embedrl_verl.families import Family, facts_of

Clip = tuple[np.ndarray, FrameTimes]
"""uint8 (T, height, width, 3), T even, and when its T frames stand in the clip."""


class PromptExpander:
    """For one checkpoint's Hugging Face processor. `tokens_per_second`: time axis of videos (Qwen2.5-VL)."""

    def __init__(self, processor: Any, family: Family, tokens_per_second: float = 1.0) -> None:
        for one in (processor.image_processor, processor.video_processor):
            if not (one.do_rescale and one.do_normalize and abs(one.rescale_factor * 255 - 1) < 1e-6):
                raise EmbedderError(
                    "the checkpoint's image processor must rescale by 1/255 and normalise; got do_rescale="
                    f"{one.do_rescale}, do_normalize={one.do_normalize}, rescale_factor={one.rescale_factor}"
                )
        self._family, self._clip_time = family, facts_of(family).clip_time
        # Bare: transformers' wrapper takes as long again in every row. It would also drop these two, which a
        # tokenizer.json may bring from whoever saved it.
        self._tokenizer = processor.tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._image, self._video = processor.image_processor, processor.video_processor
        self._tokens_per_second = tokens_per_second
        self._image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._video_id = processor.tokenizer.convert_tokens_to_ids(VIDEO_PAD)

    def tokens(
        self, prompt: str, images: Sequence[Image.Image], videos: Sequence[Clip]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 (L,) and positions int64 (4, L), each placeholder repeated as often as its medium has merged
        tokens; media in reading order."""
        patch_frames = self._video.temporal_patch_size
        side = self._image.patch_size * self._image.merge_size
        grids = [(1, image.height // side, image.width // side) for image in images]
        side = self._video.patch_size * self._video.merge_size
        clips = [(len(f) // patch_frames, f.shape[1] // side, f.shape[2] // side) for f, _ in videos]
        steps = [1.0] * len(clips)
        if self._clip_time == "seconds":
            # transformers and vLLM keep the seconds in float32, and positions are cut to integers after that
            seconds = [float(np.float32(patch_frames / times.fps)) for _, times in videos]
            steps = [self._tokens_per_second * one for one in seconds]
        if self._clip_time == "stamps":
            first, *others = prompt.split(f"{VISION_START}{VIDEO_PAD}{VISION_END}")
            stamps = [_time_stamps(times.seconds, patch_frames) for _, times in videos]
            prompt = first + "".join(stamp + text for stamp, text in zip(stamps, others, strict=True))
        media = {
            self._image_id: [(grid, 1.0) for grid in grids],
            self._video_id: clip_media(self._family, clips, steps),
        }
        sizes = {pad: iter([t * h * w for (t, h, w), _ in some]) for pad, some in media.items()}
        tokens: list[int] = []
        for token in self._tokenizer.encode(prompt, add_special_tokens=False).ids:
            tokens += [token] * (next(sizes[token]) if token in sizes else 1)
        return torch.tensor(tokens), mrope_positions(tokens, media)

    def pixels(
        self, images: Sequence[Image.Image], videos: Sequence[Clip], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Patches and grids as the model takes them; keys of absent media are absent."""
        found: dict[str, torch.Tensor] = {}
        for media, processor, name, grid in (
            ([np.asarray(image)[None] for image in images], self._image, "pixel_values", "image_grid_thw"),
            ([frames for frames, _ in videos], self._video, "pixel_values_videos", "video_grid_thw"),
        ):
            if media:
                patches = [_patchify(frames, processor) for frames in media]
                found[name] = torch.cat([values for values, _ in patches]).to(dtype)
                found[grid] = torch.tensor([shape for _, shape in patches])
        return found


def _time_stamps(seconds: Sequence[float], patch_frames: int) -> str:
    """The text of a clip: before each temporal patch the mean time of its first and last frame."""
    firsts, lasts = seconds[::patch_frames], seconds[patch_frames - 1 :: patch_frames]
    means = [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]
    return "".join(f"<{second:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}" for second in means)


def _patchify(frames: np.ndarray, processor: Any) -> tuple[torch.Tensor, Grid]:
    """Normalised patches of one image (T = 1, repeated to a whole patch) or clip, in the vision model's layout.

    It reads rows of `temporal x patch x patch` pixels of all channels; the rows that are merged into one visual token
    lie side by side.

    Args:
        frames: uint8 (T, height, width, 3), sides are whole visual tokens.
        processor: Hugging Face's of images or of videos.

    Returns:
        float32 (patches, 3 * temporal * patch * patch), and the grid (t, h, w) in patches.
    """
    temporal, patch, merge = processor.temporal_patch_size, processor.patch_size, processor.merge_size
    seen = 1 if len(frames) == 1 else temporal  # frames of a patch that differ
    total, height, width, channels = frames.shape
    t, h, w = total // seen, height // patch, width // patch
    split = frames.reshape(t, seen, h // merge, merge, patch, w // merge, merge, patch, channels)
    rows = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, seen, patch**2).astype(np.float32)
    white = 1 / processor.rescale_factor
    rows -= np.array(processor.image_mean, np.float32)[:, None, None] * white
    rows /= np.array(processor.image_std, np.float32)[:, None, None] * white
    return torch.from_numpy(rows.repeat(temporal // seen, axis=2)).flatten(1), (t, h, w)
