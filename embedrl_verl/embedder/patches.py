# SPDX-License-Identifier: Apache-2.0
"""Pixels of fitted media in the layout of the Qwen-VL vision models.

The vision model reads rows of `temporal x patch x patch` pixels of all channels; four neighbouring rows are merged into
one visual token, so they lie side by side. Bit for bit what the checkpoints' image and video processors give (tests
compare the three families) in less than half the time: bytes are moved before they become floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embedrl_verl.errors import EmbedderError


@dataclass(frozen=True)
class PatchSpec:
    """Constants of one image or video processor.

    Attributes:
        patch: side of a patch in pixels; merge: patches of a visual token's side; frames: frames of a patch.
        mean, std: of the RGB values in 0..1; scale: the value that stands for 1 (255).
    """

    patch: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    @classmethod
    def of(cls, processor: Any) -> PatchSpec:
        """The constants of a Hugging Face image or video processor.

        Raises:
            EmbedderError: the processor does not rescale to 0..1 and normalise.
        """
        if not (processor.do_rescale and processor.do_normalize and abs(processor.rescale_factor * 255 - 1) < 1e-6):
            raise EmbedderError(
                "the checkpoint's image processor must rescale by 1/255 and normalise; got "
                f"do_rescale={processor.do_rescale}, do_normalize={processor.do_normalize}, "
                f"rescale_factor={processor.rescale_factor}"
            )
        return cls(
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            1 / processor.rescale_factor,
        )


def patchify(frames: np.ndarray, spec: PatchSpec) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Normalised patches of one image (T = 1, repeated to a whole patch) or one video.

    Args:
        frames: uint8 (T, height, width, 3); T is 1 or a multiple of `spec.frames`, sides are whole visual tokens.

    Returns:
        float32 (patches, 3 * frames * patch * patch), and the grid (t, h, w) in patches.
    """
    if len(frames) == 1:
        frames = np.broadcast_to(frames, (spec.frames, *frames.shape[1:]))
    total, height, width, channels = frames.shape
    t, h, w = total // spec.frames, height // spec.patch, width // spec.patch
    split = frames.reshape(
        t, spec.frames, h // spec.merge, spec.merge, spec.patch, w // spec.merge, spec.merge, spec.patch, channels
    )
    rows = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, channels, -1).astype(np.float32)
    rows -= np.array(spec.mean, np.float32)[:, None] * spec.scale
    rows /= np.array(spec.std, np.float32)[:, None] * spec.scale
    return torch.from_numpy(rows).flatten(1), (t, h, w)
