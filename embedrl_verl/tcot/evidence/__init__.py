# SPDX-License-Identifier: Apache-2.0
"""Evidence: what a T-CoT points at in its input, one file a kind. A new kind is its file and its place in `KINDS`;
which inputs are asked for it stands in `embedrl_verl.kinds`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedrl_verl.errors import DataError
from embedrl_verl.families import Family, box_convention
from embedrl_verl.tcot.evidence.boxes import BOXES
from embedrl_verl.tcot.evidence.frames import FRAMES
from embedrl_verl.tcot.evidence.keywords import KEYWORDS
from embedrl_verl.tcot.evidence.kind import EvidenceKind, Originals
from embedrl_verl.tcot.problems import Problems

if TYPE_CHECKING:
    from PIL import Image

    from embedrl_verl.tcot.form import TCoT

KINDS: dict[str, EvidenceKind] = {kind.key: kind for kind in (KEYWORDS, BOXES, FRAMES)}

MIN_SIDE = 10
"""Shortest side of a crop in pixels of the original (method section 2)."""
MAX_ASPECT = 50.0
"""Largest ratio of a crop's sides (method section 2)."""
MAX_EVIDENCE = 8


@dataclass(frozen=True)
class Evidence:
    """`images`: crops in the order of their boxes, then key frames in the order in which they were written; `problems`:
    why some were left out, one line a reason: a bad pointer must not lose the row, and must not be silent."""

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
    """
    convention = box_convention(family)
    sizes = [image.size for image in images]
    if resized_sizes is not None:
        sizes = list(resized_sizes)
        if len(sizes) != len(images):
            raise DataError(
                f"resized_sizes must have one size for each image; got {len(sizes)} for {len(images)} images"
            )
    problems = Problems()
    originals = Originals(images, frames, convention, sizes, min_side, max_aspect)
    pieces = [
        piece for key, kind in KINDS.items() for piece in kind.cut(tcot.evidence.get(key, ()), originals, problems)
    ]
    if len(pieces) > max_evidence:
        problems.add(f"at most {max_evidence} pieces of evidence are kept, the first ones", len(pieces))
    return Evidence(tuple(piece() for piece in pieces[:max_evidence]), problems.lines())
