# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from embedrl_verl.data.identity import content_id, records_digest
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import MediaError

MakePair = Callable[..., PairRecord]

# Ids of the target_ids "0" and "1": other values would change the masks of a resumed run.
PINNED = [-862564765626576868, -2137429988781005429]


def test_the_same_target_id_is_the_same_content(pair: MakePair) -> None:
    first, second = pair("p0", target=Item(text="a"), target_id="x"), pair("p1", target=Item(text="b"), target_id="x")
    assert content_id(first, None) == content_id(second, None)
    assert content_id(first, None) != content_id(pair("p2", target=Item(text="a"), target_id="y"), None)


def test_without_an_id_text_counts_without_case_width_and_spacing(pair: MakePair) -> None:
    def of(text: str) -> int:
        return content_id(pair("p", target=Item(text=text)), None)

    assert of("The  Cat\n") == of("the cat") == of("ｔｈｅ cat")
    assert of("the cat") != of("the cats")


def test_without_an_id_media_count_by_their_bytes(pair: MakePair, root: Path) -> None:
    def of(*images: str | bytes, text: str = "") -> int:
        return content_id(pair("p", target=Item(text=text, images=images)), root)

    (root / "copy.png").write_bytes((root / "a.png").read_bytes())
    assert of("a.png") == of("copy.png") == of((root / "a.png").read_bytes())
    assert (
        len({of("a.png"), of("sub/b.png"), of("a.png", text="t"), of("a.png", "a.png"), of("sub/b.png", "a.png")}) == 5
    )


def test_frames_are_not_images_and_files_count_by_bytes(pair: MakePair, root: Path) -> None:
    def of(video: Video) -> int:
        return content_id(pair("p", target=Item(video=video)), root)

    images = content_id(pair("p", target=Item(images=("a.png",))), root)
    assert of(Video(frames=("a.png",))) != images
    assert of(Video(frames=("a.png",), fps=1.0)) == of(Video(path="a.png"))


def test_ids_are_stable_int64(pair: MakePair) -> None:
    ids = [content_id(pair("p", target_id=str(index)), None) for index in range(200)]
    assert len(set(ids)) == 200
    assert all(-(2**63) <= value < 2**63 for value in ids)
    assert ids[:2] == PINNED


def test_missing_medium_is_an_error(pair: MakePair, root: Path) -> None:
    with pytest.raises(MediaError, match=r"gone\.png"):
        content_id(pair("p", target=Item(images=("gone.png",))), root)


def test_the_digest_of_records_changes_with_any_field_their_order_and_a_files_size(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    first = PairRecord("p", "s", "find", Item(text="q", images=("a.png",)), Item(text="t", images=(b"x",)), "")
    second = PairRecord(
        "r", "s", "find", Item(text="q", video=Video(frames=(b"1", b"2"), fps=2.0)), Item(text="t"), "id"
    )
    known = records_digest([first, second], tmp_path)
    assert known == records_digest([first, second], tmp_path)
    others = [
        [second, first],
        [first],
        [replace(first, instruction="look"), second],
        [replace(first, target_id="one"), second],
        [replace(first, query=replace(first.query, text="q ")), second],
        [replace(first, target=replace(first.target, images=(b"y",))), second],
        [first, replace(second, query=replace(second.query, video=Video(frames=(b"1", b"2"), fps=1.0)))],
        [first, replace(second, query=replace(second.query, video=Video(frames=(b"2", b"1"), fps=2.0)))],
        [first, replace(second, negatives=(Item(text="n"),))],
    ]
    digests = [records_digest(records, tmp_path) for records in others]
    (tmp_path / "a.png").write_bytes(b"another picture")
    digests.append(records_digest([first, second], tmp_path))
    assert len({known, *digests}) == len(digests) + 1
