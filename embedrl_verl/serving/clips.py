# SPDX-License-Identifier: Apache-2.0
"""Media in a request to vLLM, and what it has to be told about a clip beside its frames: when they stand in it.

Pixels travel without loss: an image as PNG, a clip as vLLM's list of frames (media type video/jpeg, whose frames it
opens with Pillow whatever their format, hence PNG too).

Qwen3-VL writes the times into the prompt, Qwen2.5-VL into the positions (the seconds between two temporal patches).
Without metadata vLLM takes 24 frames a second; for Qwen2.5-VL it does so even where metadata lies beside the frames,
unless a request's processor arguments hold them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from embedrl_verl.data.video import FrameTimes
from embedrl_verl.families import Family, facts_of

_RUN_LENGTHS = 3  # zlib's Z_RLE: half of the default's time, and no larger on photos


def image_part(image: Image.Image) -> dict[str, Any]:
    """Part of a message that shows an image."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}}


def clip_part(frames: Iterable[Image.Image]) -> dict[str, Any]:
    """Part of a message that shows a clip; its times go with the request (`request_arguments`)."""
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(map(_png, frames))}"}}


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=_RUN_LENGTHS)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


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
