# SPDX-License-Identifier: Apache-2.0
"""Prompts whose media are references, and the pixels that the model gets for them.

A row of verl's queue is copied for every rollout, so a prompt carries paths (or encoded bytes), not pixels. The T-CoT
templates are filled with stand-ins, one for each medium, which are then exchanged for references; the agent loop turns
references into fitted media with `load_prompt_media`. Length filter and rollout both call that function, so the prompt
that is counted is the prompt that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from embedrl_verl.data.media import (
    LoadedItem,
    MediaLimits,
    describe,
    drawn_frames,
    fit_image,
    load_frames,
    load_image,
    to_rgb,
)
from embedrl_verl.data.schema import Media, PairRecord, Side, Video, input_kind
from embedrl_verl.data.video import DEFAULT_FPS, FrameTimes
from embedrl_verl.errors import ConfigError, MediaError
from embedrl_verl.families import Family
from embedrl_verl.tcot import build_prompt

Messages: TypeAlias = list[dict[str, Any]]
VideoInput: TypeAlias = tuple[torch.Tensor, dict[str, Any]]
CACHED_PROMPTS = 32


def prompt_messages(
    record: PairRecord, side: Side, *, family: Family, style: str, few_shot: bool, max_frames: int, file_frames: int = 0
) -> Messages:
    """Chat messages that ask for the T-CoT of one side, with references in place of media.

    Args:
        record, side: which prompt.
        family, style, few_shot: choose the template, see `embedrl_verl.tcot.build_prompt`.
        max_frames: frames drawn from a list of frames.
        file_frames: frames that a video *file* yields (it has to be decoded to know).

    Returns:
        Messages whose image parts hold {"image": path or bytes} and whose video part holds {"video": list of these,
        "times": FrameTimes} or {"video": path of a file, "fps": float}; both as `load_prompt_media` reads them.

    Raises:
        ConfigError: the template adds media of its own.
    """
    item = record.item(side)
    part = _video_part(item.video, max_frames) if item.video else None
    num_frames = 0 if not part else file_frames if isinstance(part["video"], str) else len(part["video"])
    stand_ins = LoadedItem(
        text=item.text,
        instruction=item.instruction,
        images=tuple(Image.new("RGB", (1, 1)) for _ in item.images),
        frames=tuple(Image.new("RGB", (1, 1)) for _ in range(num_frames)),
        fps=item.video.fps if item.video else None,
        kind=item.kind,
    )
    messages = build_prompt(
        input_kind(record, side), stand_ins, family=family, style=style, few_shot=few_shot, gold_answer=None
    )
    reference_of = {id(image): media for image, media in zip(stand_ins.images, item.images, strict=True)}
    return [{**message, "content": _with_references(message["content"], reference_of, part)} for message in messages]


def _video_part(video: Video, max_frames: int) -> dict[str, Any]:
    """The clip with the frames that `load_frames` would keep; a file stays a file."""
    if video.path is not None:
        return {"type": "video", "video": video.path, "fps": video.fps or DEFAULT_FPS}
    frames, times = drawn_frames(video, max_frames)
    return {"type": "video", "video": list(frames), "times": times}


def _with_references(content: Any, reference_of: dict[int, Media], video: dict[str, Any] | None) -> Any:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "image":
            if id(part["image"]) not in reference_of:
                raise ConfigError("a prompt template must not hold images of its own")
            parts.append({"type": "image", "image": reference_of[id(part["image"])]})
        elif part["type"] == "video":
            if video is None:
                raise ConfigError("a prompt template must not hold a video of its own")
            parts.append(dict(video))
        else:
            parts.append(part)
    return parts


def load_prompt_media(
    messages: Sequence[dict[str, Any]], limits: MediaLimits, media_root: str | None
) -> tuple[list[Image.Image] | None, list[VideoInput] | None]:
    """The media of a prompt in order, decoded and fitted, in the form that verl hands to processor and vLLM.

    Media parts may hold references or decoded images. The rollouts of one prompt share the result: do not change it.

    Returns:
        Images, and videos as (uint8 tensor (T, 3, H, W), metadata). T is even: an odd clip repeats its last frame,
        since one visual token spans two frames. None instead of an empty list.

    Raises:
        MediaError: naming the medium and the reason.
    """
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    clips = [part for part in parts if part["type"] == "video"]
    fitted = [
        _fit(image, "image", limits) if isinstance(image, Image.Image) else _fitted_image(image, limits, media_root)
        for image in images
    ]
    videos = [_clip(part, limits, media_root) for part in clips]
    return fitted or None, videos or None


def _clip(part: dict[str, Any], limits: MediaLimits, media_root: str | None) -> VideoInput:
    clip = part["video"]
    if isinstance(clip, str):
        return _fitted_file(Video(path=clip, fps=float(part["fps"])), limits, media_root)
    if isinstance(clip[0], Image.Image):
        return _video_input(tuple(clip), part["times"], "video", limits)
    return _fitted_frames(tuple(clip), part["times"], limits, media_root)


@lru_cache(maxsize=CACHED_PROMPTS)
def _fitted_image(media: Media, limits: MediaLimits, media_root: str | None) -> Image.Image:
    return _fit(load_image(media, media_root), describe(media), limits)


@lru_cache(maxsize=CACHED_PROMPTS)
def _fitted_file(video: Video, limits: MediaLimits, media_root: str | None) -> VideoInput:
    frames, times = load_frames(video, media_root, limits.max_frames)
    return _video_input(frames, times, f"video {video.path!r}", limits)


@lru_cache(maxsize=CACHED_PROMPTS)
def _fitted_frames(
    frames: tuple[Media, ...], times: FrameTimes, limits: MediaLimits, media_root: str | None
) -> VideoInput:
    images = tuple(load_image(frame, media_root) for frame in frames)
    return _video_input(images, times, "video frame", limits)


def _fit(image: Image.Image, name: str, limits: MediaLimits, is_frame: bool = False) -> Image.Image:
    try:
        return fit_image(image, limits, is_frame=is_frame)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error


def _video_input(frames: tuple[Image.Image, ...], times: FrameTimes, name: str, limits: MediaLimits) -> VideoInput:
    """Frames at the size that the first one calls for, and metadata with which no processor samples them again."""
    first = _fit(frames[0], name, limits, is_frame=True)
    fitted = [first] + [to_rgb(frame).resize(first.size, Image.Resampling.BICUBIC) for frame in frames[1:]]
    fitted += fitted[-1:] * (len(fitted) % 2)
    frames_THWC = np.stack([np.asarray(frame) for frame in fitted])
    video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2).contiguous()
    return video_TCHW, times.padded(len(fitted)).metadata()
