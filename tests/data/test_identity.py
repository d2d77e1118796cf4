# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch

from embedrl_verl.data.identity import content_id, false_negative_share, record_digest, shares_content
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import MediaError

# Ids of the target_ids "0" and "1": other values would change the masks of a resumed run.
PINNED = [-862564765626576868, -2137429988781005429]


def test_the_same_target_id_is_the_same_content(pair):
    first, second = pair("p0", target=Item(text="a"), target_id="x"), pair("p1", target=Item(text="b"), target_id="x")
    assert content_id(first, None).target == content_id(second, None).target
    assert content_id(first, None).target != content_id(pair("p2", target=Item(text="a"), target_id="y"), None).target


def test_without_an_id_text_counts_without_case_width_and_spacing(pair):
    def of(text):
        return content_id(pair("p", target=Item(text=text)), None).target

    assert of("The  Cat\n") == of("the cat") == of("ｔｈｅ cat")
    assert of("the cat") != of("the cats")


def test_without_an_id_media_count_by_their_bytes(pair, root):
    def of(*images, text=""):
        return content_id(pair("p", target=Item(text=text, images=images)), root).target

    (root / "copy.png").write_bytes((root / "a.png").read_bytes())
    assert of("a.png") == of("copy.png") == of((root / "a.png").read_bytes())
    assert (
        len({of("a.png"), of("sub/b.png"), of("a.png", text="t"), of("a.png", "a.png"), of("sub/b.png", "a.png")}) == 5
    )


def test_frames_are_not_images_and_files_count_by_bytes(pair, root):
    def of(video):
        return content_id(pair("p", target=Item(video=video)), root).target

    images = content_id(pair("p", target=Item(images=("a.png",))), root).target
    assert of(Video(frames=("a.png",))) != images
    assert of(Video(frames=("a.png",), fps=1.0)) == of(Video(path="a.png"))


def test_ids_are_stable_int64(pair):
    ids = [content_id(pair("p", target_id=str(index)), None).target for index in range(200)]
    assert len(set(ids)) == 200
    assert all(-(2**63) <= value < 2**63 for value in ids)
    assert ids[:2] == PINNED


def test_missing_medium_is_an_error(pair, root):
    for side in ("query", "target"):
        with pytest.raises(MediaError, match=r"gone\.png"):
            content_id(pair("p", **{side: Item(images=("gone.png",))}), root)


def test_the_digest_of_records_changes_with_any_field_their_order_and_a_files_size(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    first = PairRecord("p", "s", "find", Item(text="q", images=("a.png",)), Item(text="t", images=(b"x",)), "")
    second = PairRecord(
        "r", "s", "find", Item(text="q", video=Video(frames=(b"1", b"2"), fps=2.0)), Item(text="t"), "id"
    )
    known = tuple(record_digest(one, tmp_path) for one in (first, second))
    assert known == tuple(record_digest(one, tmp_path) for one in (first, second))
    others = [
        [second, first],
        [first],
        [replace(first, instruction="look"), second],
        [replace(first, target_id="one"), second],
        [replace(first, query_id="one"), second],
        [replace(first, query=replace(first.query, text="q ")), second],
        [replace(first, target=replace(first.target, images=(b"y",))), second],
        [first, replace(second, query=replace(second.query, video=Video(frames=(b"1", b"2"), fps=1.0)))],
        [first, replace(second, query=replace(second.query, video=Video(frames=(b"2", b"1"), fps=2.0)))],
        [first, replace(second, negatives=(Item(text="n"),))],
    ]
    digests = [tuple(record_digest(one, tmp_path) for one in records) for records in others]
    (tmp_path / "a.png").write_bytes(b"another picture")
    digests.append(tuple(record_digest(one, tmp_path) for one in (first, second)))
    assert len({known, *digests}) == len(digests) + 1


def test_queries_are_equal_by_id_or_by_instruction_text_and_media(pair, root):
    def of(query, **change):
        return content_id(replace(pair("p", query=query), **change), root).query

    photo, copy = Item(images=("a.png",)), Item(images=((root / "a.png").read_bytes(),))
    assert of(photo) == of(copy) == of(replace(photo, instruction="FIND  the answer."))
    assert of(photo, pair_id="r", target_id="x") == of(photo), "the target does not count"
    different = [
        of(photo),
        of(photo, instruction="Name it."),
        of(replace(photo, text="t")),
        of(Item(images=("sub/b.png",))),
    ]
    assert len(set(different)) == 4
    assert of(Item(text="b c"), instruction="a") != of(Item(text="c"), instruction="a b")
    assert of(photo, query_id="x") == of(Item(text="other"), query_id="x") != of(photo, query_id="y")
    assert of(photo, query_id="x") != of(photo)


def test_content_is_shared_by_id_and_not_along_a_chain():
    chain = torch.tensor([[1, 10], [1, 20], [2, 20], [20, 1]])  # the last has the others' numbers in the wrong places
    first, second, third = [True, True, False, False], [True, True, True, False], [False, True, True, False]
    assert shares_content(chain, chain).tolist() == [first, second, third, [False] * 3 + [True]]
    assert shares_content(chain[:2], chain[2:]).tolist() == [[False, False], [True, False]]
    assert shares_content(chain[:, 1], chain[1:, 1]).tolist() == [
        [a == b for b in (20, 20, 1)] for a in (10, 20, 20, 1)
    ]
    assert shares_content(chain[:0], chain).shape == (0, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_share_of_false_negatives_is_that_of_the_matrix(seed):
    ids = np.random.default_rng(seed).integers(0, 9, (40, 2))
    found = shares_content(torch.tensor(ids), torch.tensor(ids))
    assert false_negative_share(*ids.T) == pytest.approx((int(found.sum()) - 40) / (40 * 39))
    assert false_negative_share(*ids[:1].T) == false_negative_share(*ids[:0].T) == 0.0
