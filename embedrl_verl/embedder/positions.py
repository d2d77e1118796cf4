# SPDX-License-Identifier: Apache-2.0
"""M-RoPE positions of a prompt with images and clips, as the Qwen-VL checkpoints were trained with.

Text advances all three axes (time, height, width) together. A medium of t x h x w merged tokens starts right after
the text before it and counts time, rows and columns from there; the text after it resumes behind the largest position
so far. A clip's time axis advances by a time step a temporal patch. Qwen3-VL writes its time stamps as text, so each of
its temporal patches is a medium of its own with t = 1.

Implementations disagree for clips: transformers 5.9 resumes behind max(h, w), as if a clip had no length in time, and
cuts the seconds between temporal patches to whole ones; verl 0.9.1 doubles Qwen2-VL's time axis. This is the original
rule, which vLLM follows. Positions are always passed to the Embedder, and `bind_positions` gives them to the actor,
which would else be trained on a clip at other times than it was rolled out on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from embedrl_verl.families import Family, facts_of

Grid = tuple[int, int, int]
"""(t, h, w) of a medium in merged tokens."""
Medium = tuple[Grid, float]
"""Its grid, and the steps of the time axis between its temporal patches (1.0 for an image)."""


def mrope_positions(tokens: Sequence[int], media: Mapping[int, Sequence[Medium]]) -> torch.Tensor:
    """Positions of one prompt: int64 (4, L), the index of the token, then time, height and width.

    Args:
        tokens: L ids, placeholders expanded.
        media: id of a placeholder -> the media that it stands for, in reading order.
    """
    positions = np.empty((4, len(tokens)), np.int64)
    positions[0] = np.arange(len(tokens))
    queues = {pad: list(waiting) for pad, waiting in media.items()}
    left = sum(map(len, queues.values()))
    place = behind = start = 0
    while left and place < len(tokens):
        waiting = queues.get(tokens[place])
        if not waiting:  # text; also a placeholder that the policy itself has sampled
            place += 1
            continue
        (t, h, w), time_step = waiting.pop(0)
        left -= 1
        positions[1:, behind:place] = np.arange(start, start + place - behind)
        start += place - behind
        grid = np.indices((t, h, w)).reshape(3, -1)
        grid[0] = (grid[0] * time_step).astype(np.int64)
        behind = place + t * h * w
        if behind > len(tokens):
            break
        positions[1:, place:behind] = start + grid
        start += int(grid.max()) + 1
        place = behind
    if behind > len(tokens) or any(queues.values()):
        raise ValueError(f"a row must have the placeholders of its media, {list(media.values())}; it has fewer")
    positions[1:, behind:] = np.arange(start, start + len(tokens) - behind)
    return torch.from_numpy(positions)


def time_steps_a_second(config: PretrainedConfig) -> float:
    """Steps of a clip's time axis in a second, of families that count seconds; else 1.0."""
    if facts_of(config.model_type).clip_time != "seconds":
        return 1.0
    return float(config.vision_config.tokens_per_second)


def clip_media(family: str, clips: Sequence[Grid], time_steps: Sequence[float]) -> list[Medium]:
    """Grid and time step of each medium that clips are to a family: a patch behind a time stamp is one of its own.

    `time_steps`: of each clip, steps of its time axis between temporal patches.
    """
    if facts_of(family).clip_time == "stamps":
        return [((1, h, w), 1.0) for t, h, w in clips for _ in range(t)]
    return list(zip(clips, time_steps, strict=True))


def bind_positions(processor: Any, family: Family) -> None:
    """Let `processor`, loaded by verl's `hf_processor`, tell the actor's positions by the original rule.

    verl asks `get_rope_index`, to which its loader binds transformers' own, and `get_rope_index_kwargs`, its hook for
    more arguments. A second call does nothing.
    """
    if not isinstance(getattr(processor.get_rope_index, "__self__", None), _ActorPositions):
        positions = _ActorPositions(processor, family)
        processor.get_rope_index = positions.get_rope_index
        processor.get_rope_index_kwargs = positions.get_rope_index_kwargs


class _ActorPositions:
    def __init__(self, processor: Any, family: Family) -> None:
        self._image_id, self._video_id = processor.image_token_id, processor.video_token_id
        self._merge = processor.image_processor.merge_size
        self._family = family
        self._per_second = time_steps_a_second(processor.config)

    def get_rope_index_kwargs(self, multi_modal_inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The seconds between temporal patches, which verl itself leaves out."""
        return {"second_per_grid_ts": multi_modal_inputs.get("second_per_grid_ts")}

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        **_token_types: Any,
    ) -> tuple[torch.Tensor, None]:
        """int64 (3, 1, L), 0 where the mask is 0, and None.

        Args:
            input_ids, attention_mask: (1, L), placeholders expanded.
            image_grid_thw, video_grid_thw: (media, 3), in patches.
            second_per_grid_ts: (videos,), of Qwen2.5-VL.
        """
        shown = attention_mask[0].bool()
        tokens = input_ids[0][shown].tolist()
        images, videos = self._grids(image_grid_thw), self._grids(video_grid_thw)
        steps = [1.0] * len(videos)
        if facts_of(self._family).clip_time == "seconds" and videos:
            if second_per_grid_ts is None:
                raise ValueError("a clip of this family needs second_per_grid_ts; the processor gave none")
            steps = [float(second) * self._per_second for second in second_per_grid_ts]
        media = {
            self._image_id: [(grid, 1.0) for grid in images],
            self._video_id: clip_media(self._family, videos, steps),
        }
        positions = torch.zeros(3, 1, len(shown), dtype=torch.int64)
        positions[:, 0, shown] = mrope_positions(tokens, media)[1:]
        return positions, None

    def _grids(self, grid_thw: torch.Tensor | None) -> list[Grid]:
        rows = [] if grid_thw is None else grid_thw.tolist()
        return [(t, h // self._merge, w // self._merge) for t, h, w in rows]
