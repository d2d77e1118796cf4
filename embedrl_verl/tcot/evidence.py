# SPDX-License-Identifier: Apache-2.0
"""Evidence: the crops and key frames that a T-CoT points at, cut from the original media.

What cannot be cut is left out and told in `problems`: a bad pointer must not lose the row, and must not be silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedrl_verl.errors import DataError
from embedrl_verl.families import Family, box_convention
from embedrl_verl.tcot.boxes import PixelBox, boxes_to_pixels
from embedrl_verl.tcot.problems import Problems
from embedrl_verl.tcot.schema import TCoT

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 10
"""Shortest side of a crop in pixels of the original (method section 2)."""
MAX_ASPECT = 50.0
"""Largest ratio of a crop's sides (method section 2)."""
MAX_EVIDENCE = 8


@dataclass(frozen=True)
class Evidence:
    """Cut evidence.

    Attributes:
        images: crops in the order of their boxes, then key frames in the order in which they were written.
        problems: why boxes or frames were left out, one line a reason.
    """

    images: tuple[Image.Image, ...] = ()
    problems: tuple[str, ...] = ()


def cut_evidence(
    tcot: TCoT,
    *,
    images: Sequence[Image.Image],
    frames: Sequence[Image.Image],
    family: Family,
    resized_sizes: Sequence[tuple[int, int]] | None = None,
    min_side: int = MIN_SIDE,
    max_aspect: float = MAX_ASPECT,
    max_evidence: int = MAX_EVIDENCE,
) -> Evidence:
    """Cut a T-CoT's boxes and key frames from the original media; the same place or frame is cut once.

    Args:
        tcot: a parsed T-CoT, well formed or not.
        images: originals; a box names its image, counted from 1.
        frames: original frames of the video; key frame k, counted from 1, is frames[k - 1].
        family: the Reasoner's family, which decides the units of the boxes.
        resized_sizes: (width, height) in pixels of each image as the Reasoner saw it; read only for families that write
            absolute boxes. None = it saw the originals.
        min_side: crops with a shorter side (pixels of the original) are left out.
        max_aspect: crops whose sides differ by a larger factor are left out.
        max_evidence: at most so many pieces; the first ones are kept.

    Raises:
        ConfigError: an unknown family.
        DataError: `resized_sizes` is needed and has not one size for each image.
    """
    convention = box_convention(family)
    if convention == "relative_1000":
        sizes: Sequence[tuple[int, int]] = ()
    else:
        sizes = [image.size for image in images] if resized_sizes is None else resized_sizes
        if len(sizes) != len(images):
            raise DataError(
                f"resized_sizes must have one size for each image; got {len(sizes)} for {len(images)} images"
            )

    problems = Problems()
    crops: dict[tuple[int, PixelBox], None] = {}
    for box in tcot.boxes:
        if box.image > len(images):
            problems.add(f"a box's image must not be above the number of images, {len(images)}", box.image)
            continue
        original = images[box.image - 1]
        resized = sizes[box.image - 1] if sizes else (None, None)
        pixels = boxes_to_pixels(
            [box],
            convention=convention,
            width=original.width,
            height=original.height,
            resized_width=resized[0],
            resized_height=resized[1],
        )
        if not pixels:
            problems.add("a box must have an area inside its image", (box.x1, box.y1, box.x2, box.y2))
        elif _is_cuttable(pixels[0], min_side, max_aspect, problems):
            crops[box.image, pixels[0]] = None
    key_frames: dict[int, None] = {}
    for frame in tcot.key_frames:
        if 1 <= frame <= len(frames):
            key_frames[frame] = None
        else:
            problems.add(f"key frames must be from 1 to the number of frames, {len(frames)}", frame)

    found = len(crops) + len(key_frames)
    if found > max_evidence:
        problems.add(f"at most {max_evidence} pieces of evidence are kept, the first ones", found)
    kept_crops = list(crops)[:max_evidence]
    kept_frames = list(key_frames)[: max_evidence - len(kept_crops)]
    pieces = [images[number - 1].crop(pixel_box) for number, pixel_box in kept_crops]
    pieces += [frames[frame - 1] for frame in kept_frames]
    return Evidence(tuple(pieces), problems.lines())


def _is_cuttable(box: PixelBox, min_side: int, max_aspect: float, problems: Problems) -> bool:
    short, long = sorted((box[2] - box[0], box[3] - box[1]))
    if short < min_side:
        problems.add(f"a crop's sides must be at least {min_side} px", box)
        return False
    if long > max_aspect * short:
        problems.add(f"a crop's sides may differ by a factor of {max_aspect:g} at most", box)
        return False
    return True
