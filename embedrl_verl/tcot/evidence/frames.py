# SPDX-License-Identifier: Apache-2.0
"""Key frames of a clip: `"key_frames": [1, 4]`, integers from 1 to the number of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import getitem
from typing import Any

from embedrl_verl.tcot.evidence.kind import EvidenceKind, InputSize, Originals, Piece, items_of
from embedrl_verl.tcot.json_objects import JsonObject
from embedrl_verl.tcot.problems import Problems


def _read(found: JsonObject, size: InputSize, problems: Problems) -> Iterator[int]:
    for frame in items_of(found, "key_frames", problems):
        if type(frame) is not int:
            problems.add("a key frame must be an integer", frame)
        elif frame < 1:
            problems.add("key frames are counted from 1", frame)
        elif size.frames is not None and frame > size.frames:
            problems.add(f"key frames must not be above the number of frames, {size.frames}", frame)
        else:
            yield frame


def _cut(key_frames: Sequence[int], originals: Originals, problems: Problems) -> Sequence[Piece]:
    places: dict[int, Any] = {}
    for frame in key_frames:
        if 1 <= frame <= len(originals.frames):
            places[frame] = partial(getitem, originals.frames, frame - 1)
        else:
            problems.add(f"key frames must be from 1 to the number of frames, {len(originals.frames)}", frame)
    return list(places.values())


FRAMES = EvidenceKind(
    key="key_frames",
    medium="frames",
    ask={
        "paper": 'Point at the evidence in the video: a JSON object with the key "key_frames", a list of the numbers '
        'of the frames that decide a match, such as {"key_frames": [2, 5]}. The video has {{ num_frames }} frames, '
        "counted from 1.",
        "compact": "key_frames",
    },
    read=_read,
    cut=_cut,
)
