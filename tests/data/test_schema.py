# SPDX-License-Identifier: Apache-2.0

import pytest

from embedrl_verl.data.schema import Item, PairRecord, Video, input_kind
from embedrl_verl.errors import DataError

TEXT, IMAGE, CLIP = Item(text="a"), Item(images=("a.png",)), Item(video=Video(frames=("a.png", "b.png")))
PAGE = Item(images=("a.png",), kind="page")


def record(query, target):
    return PairRecord("p", "s", "Find it.", query, target, "")


@pytest.mark.parametrize(
    ("query", "target", "side", "kind"),
    [
        (TEXT, TEXT, "query", "query_text"),
        (TEXT, CLIP, "query", "query_text_to_video"),
        (IMAGE, TEXT, "query", "query_image"),
        (IMAGE, CLIP, "query", "query_image"),
        (PAGE, TEXT, "query", "query_page"),
        (CLIP, CLIP, "query", "query_video"),
        (TEXT, TEXT, "target", "target_text"),
        (TEXT, IMAGE, "target", "target_image"),
        (TEXT, PAGE, "target", "target_page"),
        (TEXT, CLIP, "target", "target_video"),
        (Item(text="a", images=("a.png",), video=CLIP.video), TEXT, "query", "query_video"),
    ],
)
def test_kind_follows_the_main_medium(query, target, side, kind):
    assert input_kind(record(query, target), side) == kind


def test_query_carries_the_instruction_and_target_does_not():
    pair = record(TEXT, TEXT)
    assert pair.item("query").instruction == "Find it."
    assert pair.item("target").instruction == ""
    assert record(Item(text="a", instruction="own"), TEXT).item("query").instruction == "own"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video(), "exactly one of frames and path; got 0 frames"),
        (lambda: Video(("a.png",), "a.mp4"), "exactly one of frames and path; got 1 frames"),
        (lambda: Video(("a.png",), fps=0.0), "positive number or null; got 0.0"),
        (lambda: Video(("a.png",), fps=float("nan")), "positive number or null; got nan"),
        (lambda: Item(text="a", kind="pages"), "kind must be null or 'page'; got 'pages'"),
        (lambda: Item(text="a", kind="page"), "the item has no image"),
        (lambda: record(TEXT, Item(text="  \n")), "target must have text, images or a video"),
        (lambda: PairRecord("", "s", "", TEXT, TEXT), "pair_id must not be empty"),
        (lambda: PairRecord("p", "s", "", TEXT, TEXT, "", (TEXT, Item())), r"negatives\[1\] must have"),
    ],
)
def test_impossible_records_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize("media", ["a.png", ["a.png"], ({"path": "a.png"},), (None,), None])
def test_images_and_frames_of_another_type_are_refused(media):
    """A string would be one image a letter."""
    with pytest.raises(DataError, match=r"images must be a tuple of paths \(str\) and encoded images.*; got"):
        Item(images=media)
    if media:
        with pytest.raises(DataError, match=r"video.frames must be a tuple"):
            Video(frames=media)


@pytest.mark.parametrize("video", ["a.mp4", {"path": "a.mp4"}, ("0.png", "1.png")])
def test_a_video_of_another_type_is_refused_with_how_to_write_one(video):
    with pytest.raises(DataError, match=r"video must be Video\(path='a.mp4'\) or Video\(frames="):
        Item(video=video)
