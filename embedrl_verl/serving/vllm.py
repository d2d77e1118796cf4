# SPDX-License-Identifier: Apache-2.0
"""What vLLM's server is told beyond OpenAI's API: how to sample, and media with their pixels and times.

Pixels travel without loss, as PNG. A clip travels as vLLM's list of frames, whose media type is video/jpeg; vLLM opens
the frames whatever their format. Without metadata it takes 24 frames a second: Qwen3-VL writes the times into the
prompt, Qwen2.5-VL into the positions (the seconds between two temporal patches), and for Qwen2.5-VL it does so even
where metadata lies beside the frames, unless a request's processor arguments hold them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from embedrl_verl.data.video import FrameTimes
from embedrl_verl.families import Family, facts_of

NEUTRAL_SAMPLING = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""vLLM's own defaults in process, sent by name so that a served model samples as one in process does. `vllm serve`
takes what a request leaves out from the checkpoint's generation_config.json (a repetition penalty of 1.05 and the 20
likeliest tokens, for one). Other servers may refuse the first three."""
_RUN_LENGTHS = 3  # zlib's Z_RLE of the filtered pixels: half of the default's time, and no larger on photos


def image_part(image: Image.Image) -> dict[str, Any]:
    """An image as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}}


def clip_part(frames: Iterable[Image.Image]) -> dict[str, Any]:
    """Frames as a part of a chat message, which needs the fields of `request_arguments` too."""
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(map(_png, frames))}"}}


def processor_arguments(family: Family, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mm_processor_kwargs` of a request with clips of these `FrameTimes.metadata`, of all frames that are sent.

    Empty where metadata beside the frames are heard.
    """
    if facts_of(family).clip_time != "seconds" or not clips:
        return {}
    return {"video_metadata": list(clips), "do_sample_frames": False}


def request_arguments(family: Family, clip: FrameTimes) -> dict[str, Any]:
    """Fields of a request whose one clip is a `clip_part`."""
    # vLLM would keep 32 frames; -1 keeps all.
    fields: dict[str, Any] = {"media_io_kwargs": {"video": {**clip.metadata(), "num_frames": -1}}}
    processor = processor_arguments(family, [clip.metadata()])
    return {**fields, "mm_processor_kwargs": processor} if processor else fields


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=_RUN_LENGTHS)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
