# SPDX-License-Identifier: Apache-2.0
"""The actor's M-RoPE positions by the rule by which vLLM rolled out and the Embedder reads.

verl asks the processor (`get_rope_index`, to which its loader binds transformers' own, and `get_rope_index_kwargs`,
its hook for more arguments). transformers 5.9 goes on behind a clip as if it had no length in time and cuts the seconds
between temporal patches to whole ones, so that the actor would be trained on a clip at other times than it was rolled
out on. The processor of an agent loop gets the original rule instead (`embedrl_verl.embedder.positions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from embedrl_verl.embedder.positions import Grid, clip_media, mrope_positions, time_steps_a_second
from embedrl_verl.families import Family, facts_of


def bind_positions(processor: Any, family: Family) -> None:
    """Let `processor`, loaded by verl's `hf_processor`, tell positions by the original rule; the second time does
    nothing."""
    if not isinstance(getattr(processor.get_rope_index, "__self__", None), _Positions):
        positions = _Positions(processor, family)
        processor.get_rope_index = positions.get_rope_index
        processor.get_rope_index_kwargs = positions.get_rope_index_kwargs


class _Positions:
    def __init__(self, processor: Any, family: Family) -> None:
        self._ids = (processor.image_token_id, processor.video_token_id)
        self._merge = processor.image_processor.merge_size
        self._family, self._clip_time = family, facts_of(family).clip_time
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
        """Positions of one row, placeholders expanded.

        Args:
            input_ids, attention_mask: (1, L).
            image_grid_thw, video_grid_thw: (media, 3), in patches.
            second_per_grid_ts: (videos,), of Qwen2.5-VL.

        Returns:
            int64 (3, 1, L), 0 where the mask is 0, and None.

        Raises:
            ValueError: the row has fewer placeholders than its media need.
        """
        shown = attention_mask[0].bool()
        tokens = input_ids[0][shown].tolist()
        images, videos = self._grids(image_grid_thw), self._grids(video_grid_thw)
        steps = [1.0] * len(videos)
        if self._clip_time == "seconds" and videos:
            if second_per_grid_ts is None:
                raise ValueError("a clip of this family needs second_per_grid_ts; the processor gave none")
            steps = [float(second) * self._per_second for second in second_per_grid_ts]
        queues = {
            self._ids[0]: [(grid, 1.0) for grid in images],
            self._ids[1]: clip_media(self._family, videos, steps),
        }
        media: list[tuple[int, Grid, float]] = []
        place = 0
        while place < len(tokens):
            waiting = queues.get(tokens[place])
            if not waiting:  # text; also a placeholder that the policy itself has sampled
                place += 1
                continue
            grid, step = waiting.pop(0)
            media.append((place, grid, step))
            place += grid[0] * grid[1] * grid[2]
        if place != len(tokens) or any(queues.values()):
            raise ValueError(f"a row must have the placeholders of its media, {images} and {videos}; it has fewer")
        positions = torch.zeros(3, 1, len(shown), dtype=torch.int64)
        positions[:, 0, shown] = mrope_positions(len(tokens), media)[1:]
        return positions, None

    def _grids(self, grid_thw: torch.Tensor | None) -> list[Grid]:
        """(t, rows, columns) of merged tokens."""
        rows = [] if grid_thw is None else grid_thw.tolist()
        return [(t, h // self._merge, w // self._merge) for t, h, w in rows]
