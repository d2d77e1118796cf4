# SPDX-License-Identifier: Apache-2.0
"""Prompts whose media are references, and the pixels that the model gets for them.

A row of verl's queue is copied for every rollout, so a prompt carries paths (or encoded bytes), not pixels; the agent
loop turns references into fitted media with `load_prompt_media`. Length filter and rollout both call that function, so
the prompt that is counted is the prompt that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from embedrl_verl.data.media import MediaLimits, describe, drawn_frames, fit_clip, fit_image, load_frames, load_image
from embedrl_verl.data.schema import Media, PairRecord, Side, Video, input_kind
from embedrl_verl.data.video import DEFAULT_FPS, FrameTimes
from embedrl_verl.errors import MediaError
from embedrl_verl.families import Family
from embedrl_verl.tcot.prompts import user_turn

Messages: TypeAlias = list[dict[str, Any]]
VideoInput: TypeAlias = tuple[torch.Tensor, dict[str, Any]]
CACHED_PROMPTS = 32


def prompt_messages(
    record: PairRecord, side: Side, *, family: Family, style: str, few_shot: bool, max_frames: int, file_frames: int = 0
) -> Messages:
    """The user turn that asks for the T-CoT of one side, as `embedrl_verl.tcot.build_prompt`, with references to media.

    Args:
        max_frames: frames drawn from a list of frames.
        file_frames: frames that a video *file* yields (it has to be decoded to know).

    Returns:
        Image parts hold {"image": path or bytes}, the video part {"video": list of these, "times": FrameTimes} or
        {"video": path of a file, "fps": float}; both as `load_prompt_media` reads them.
    """
    item, num_frames, video = record.item(side), 0, None
    if item.video is not None and item.video.path is not None:
        num_frames, video = file_frames, {"video": item.video.path, "fps": item.video.fps or DEFAULT_FPS}
    elif item.video is not None:
        frames, times = drawn_frames(item.video, max_frames)
        num_frames, video = len(frames), {"video": list(frames), "times": times}
    kind = input_kind(record, side)
    return user_turn(kind, item, video, num_frames=num_frames, family=family, style=style, few_shot=few_shot)


def load_prompt_media(
    messages: Sequence[dict[str, Any]], limits: MediaLimits, media_root: str | None
) -> tuple[list[Image.Image] | None, list[VideoInput] | None]:
    """The media of a prompt in order, decoded and fitted, in the form that verl hands to processor and vLLM.

    Media parts may hold references or decoded images. The rollouts of one prompt share the result: do not change it.

    Returns:
        Images, and videos as (uint8 tensor (T, 3, H, W), metadata) with which no processor samples frames again. T is
        even: an odd clip repeats its last frame. None instead of an empty list.
    """
    images: list[Image.Image] = []
    videos: list[VideoInput] = []
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    for part in parts:
        if part["type"] == "image":
            medium = part["image"]
            decoded = isinstance(medium, Image.Image)
            images.append(fit_image(medium, limits) if decoded else _image(medium, limits, media_root))
        elif part["type"] == "video":
            clip = part["video"]
            if isinstance(clip, str):
                videos.append(_file(Video(path=clip, fps=float(part["fps"])), limits, media_root)[0])
            elif isinstance(clip[0], Image.Image):
                videos.append(_video_input(clip, part["times"], limits))
            else:
                videos.append(_frames(tuple(clip), part["times"], limits, media_root))
    return images or None, videos or None


@lru_cache(maxsize=CACHED_PROMPTS)
def _image(media: Media, limits: MediaLimits, media_root: str | None) -> Image.Image:
    image = load_image(media, media_root)
    try:
        return fit_image(image, limits)
    except MediaError as error:
        raise MediaError(f"{describe(media)}: {error}") from error


def frames_of_file(path: str, fps: float | None, limits: MediaLimits, media_root: str | None) -> int:
    """Frames that a video file yields, not counting a repeated one. `load_prompt_media` does not decode it again."""
    return _file(Video(path=path, fps=fps or DEFAULT_FPS), limits, media_root)[1]


@lru_cache(maxsize=CACHED_PROMPTS)
def _file(video: Video, limits: MediaLimits, media_root: str | None) -> tuple[VideoInput, int]:
    frames, times = load_frames(video, media_root, limits.max_frames)
    return _video_input(frames, times, limits, f"video {video.path!r}"), len(frames)


@lru_cache(maxsize=CACHED_PROMPTS)
def _frames(frames: tuple[Media, ...], times: FrameTimes, limits: MediaLimits, media_root: str | None) -> VideoInput:
    return _video_input([load_image(frame, media_root) for frame in frames], times, limits, describe(frames[0]))


def _video_input(
    frames: Sequence[Image.Image], times: FrameTimes, limits: MediaLimits, name: str = "video"
) -> VideoInput:
    try:
        fitted = fit_clip(frames, limits)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    frames_THWC = np.stack([np.asarray(frame) for frame in fitted])
    video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).contiguous()
    return video_TCHW, times.padded(len(fitted)).metadata()
