# SPDX-License-Identifier: Apache-2.0
"""M-RoPE positions of a prompt with images and videos, as the Qwen-VL checkpoints were trained with.

Text advances all three axes (time, height, width) together. A medium of t x h x w merged tokens starts right after
the text before it and counts time, rows and columns from there; the text after it goes on behind the largest position
used so far. A video's time axis advances by `time_step` a temporal patch. Qwen3-VL writes its time stamps as text, so
each of its temporal patches is a medium of its own with t = 1.

Implementations disagree here for videos: transformers 5.9 goes on behind max(h, w) and forgets the time axis, verl
0.9.1 doubles Qwen2-VL's time axis. This is the original rule, which vLLM follows; positions are always passed to the
model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from embedrl_verl.families import facts_of

Grid = tuple[int, int, int]


def mrope_positions(length: int, media: Sequence[tuple[int, Grid, float]]) -> torch.Tensor:
    """Positions of one prompt.

    Args:
        length: L, tokens with placeholders expanded.
        media: per medium in reading order: index of its first placeholder, its grid (t, h, w) in merged tokens, and the
            time step between temporal patches (1.0 for images).

    Returns:
        int64 (4, L): the index of the token, then time, height and width.
    """
    positions = np.empty((4, length), np.int64)
    positions[0] = np.arange(length)
    cursor, start = 0, 0
    for offset, (t, h, w), time_step in media:
        positions[1:, cursor:offset] = np.arange(start, start + offset - cursor)
        start += offset - cursor
        grid = np.indices((t, h, w)).reshape(3, -1)
        grid[0] = (grid[0] * time_step).astype(np.int64)
        cursor = offset + t * h * w
        positions[1:, offset:cursor] = start + grid
        start += int(grid.max()) + 1
    positions[1:, cursor:] = np.arange(start, start + length - cursor)
    return torch.from_numpy(positions)


def time_steps_a_second(config: PretrainedConfig) -> float:
    """Steps of a clip's time axis in a second, of families that count seconds; else 1.0.

    Args:
        config: of the whole model.
    """
    if facts_of(config.model_type).clip_time != "seconds":
        return 1.0
    return float(config.vision_config.tokens_per_second)


def clip_media(family: str, clips: Sequence[Grid], time_steps: Sequence[float]) -> list[tuple[Grid, float]]:
    """Grid and time step of each medium that clips are to a family: where each temporal patch stands behind its own
    time stamp, it is a medium of its own.

    Args:
        clips, time_steps: grid (t, h, w) in merged tokens of each clip, and steps of its time axis between patches.
    """
    if facts_of(family).clip_time == "stamps":
        return [((1, h, w), 1.0) for t, h, w in clips for _ in range(t)]
    return list(zip(clips, time_steps, strict=True))
