# SPDX-License-Identifier: Apache-2.0
"""What vLLM has to be told about a clip beside its frames: when they stand in it.

Qwen3-VL writes the times into the prompt, Qwen2.5-VL into the positions (the seconds between two temporal patches).
Without metadata vLLM takes 24 frames a second; for Qwen2.5-VL it does so even where metadata lies beside the frames,
unless a request's processor arguments hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedrl_verl.data.video import FrameTimes
from embedrl_verl.families import Family, facts_of


def processor_arguments(family: Family, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mm_processor_kwargs` of a request with clips of these `FrameTimes.metadata`, of all frames that are sent.

    Empty where metadata beside the frames are heard.
    """
    if facts_of(family).clip_time != "seconds" or not clips:
        return {}
    return {"video_metadata": list(clips), "do_sample_frames": False}


def request_arguments(family: Family, clip: FrameTimes) -> dict[str, Any]:
    """Fields of an HTTP request whose one clip travels as vLLM's list of frames (video/jpeg)."""
    # vLLM would keep 32 frames; -1 keeps all.
    fields: dict[str, Any] = {"media_io_kwargs": {"video": {**clip.metadata(), "num_frames": -1}}}
    processor = processor_arguments(family, [clip.metadata()])
    return {**fields, "mm_processor_kwargs": processor} if processor else fields
