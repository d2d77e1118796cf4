# SPDX-License-Identifier: Apache-2.0
"""Where media go, what is counted, and what is looked at."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from embedrl_verl.convert import media_store
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.media_store import MediaStore
from embedrl_verl.data.media import load_image
from embedrl_verl.data.schema import Item, Media, PairRecord, Video
from tests.convert.conftest import draw, files_below
from tests.convert.make_fixtures import Pen, write_video

CLIP = Video(path="clip.MP4", fps=2.0)


def pair(*images: Media, video: Video | None = None, negatives: tuple[Item, ...] = ()) -> PairRecord:
    return PairRecord("p", "s", "", Item(text="q", images=images, video=video), Item(text="t"), "", negatives)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"a.png": draw(1), "b.jpeg": draw(2, "JPEG"), "text.png": b"no image", "torn.png": draw(3)[:-300]}
    for name, content in {**files, "noise.mp4": b"no video"}.items():
        (tmp_path / name).write_bytes(content)
    write_video(tmp_path / "clip.mp4", [Pen().picture(digit, rows=2) for digit in "123456"])
    return (tmp_path / "clip.mp4").rename(tmp_path / "clip.MP4").parent


def store(root: Path, place: str = "keep", verify: str = "decode") -> MediaStore:
    return MediaStore(place, verify, root, root / "out")


def test_files_keep_their_bytes_under_their_hash_and_are_stored_once(root: Path) -> None:
    counts, files, media = Counter[str](), store(root, "files"), root / "out" / "media"
    frames = Video(frames=("a.png", draw(5, "WEBP")), fps=2.0)
    one = files.put(pair("a.png", draw(2, "JPEG"), video=frames), counts)
    two = files.put(pair("b.jpeg", video=CLIP, negatives=(Item(images=("a.png",)),)), counts)
    assert two.negatives[0].images[0] == one.query.images[0]
    assert two.query.images[0] == one.query.images[1]  # bytes and file of the same content
    paths = [*one.query.images, *one.query.video.frames, two.query.video.path]
    film = (root / "clip.MP4").read_bytes()
    for path, original in zip(paths, [draw(1), draw(2, "JPEG"), draw(1), draw(5, "WEBP"), film], strict=True):
        assert (media / path).read_bytes() == original
        assert Path(path).stem == hashlib.sha256(original).hexdigest()
        if original != film:
            assert load_image(path, media).tobytes() == load_image(original, None).tobytes()
    assert sorted(Path(path).suffix for path in files_below(media)) == [".jpg", ".mp4", ".png", ".webp"]
    assert counts == Counter(images=4, frames=2, videos=2, paths=7)


def test_embedding_gives_the_bytes_of_the_files_and_keeping_changes_nothing(root: Path) -> None:
    embedded, kept = Counter[str](), Counter[str]()
    record = store(root, "embed").put(pair("a.png", video=Video(frames=("b.jpeg",))), embedded)
    assert (record.query.images, record.query.video) == ((draw(1),), Video(frames=(draw(2, "JPEG"),)))
    assert embedded["paths"] == 0
    record = pair("a.png", draw(2), video=CLIP)
    assert store(root).put(record, kept) is record
    assert (kept["images"], kept["videos"], kept["paths"]) == (2, 1, 2)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("place", "record", "field", "reason"),
    [
        ("files", pair("a.png", "torn.png"), "images[1]", "not a readable image"),
        ("files", pair("a.png", b"no image"), "images[1]", "not a readable image"),
        ("embed", pair("a.png", video=CLIP), "video.path", "a video file cannot be embedded; place media as files"),
        ("keep", pair(draw(0, width=1000, height=2)), "images[0]", "factor of 200 at most; got 1000x2"),
    ],
)
def test_nothing_is_written_of_a_record_that_is_refused(
    root: Path, place: str, record: PairRecord, field: str, reason: str
) -> None:
    with pytest.raises(RowError, match=reason) as raised:
        store(root, place).put(record, Counter())
    assert raised.value.field == f"query.{field}"
    assert not (root / "out").exists()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_images_are_kept_and_counted(root: Path, format: str) -> None:
    counts, moving = Counter[str](), draw(0, format, frames=3)
    assert store(root).put(pair(moving, draw(0, format)), counts).query.images[0] == moving
    assert (counts["images"], counts["animated"]) == (2, 1)


def test_no_more_is_opened_than_is_to_be_verified(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(root, verify="none").put(pair("missing.png", "text.png", b"no image"), Counter())
    store(root, verify="exists").put(pair("torn.png", video=Video(path="noise.mp4")), Counter())
    for path in ("../outside.png", "/etc/hostname", "a/../../b"):
        with pytest.raises(RowError, match=r"must be relative to the media root, without '\.\.'"):
            store(root, verify="none").put(pair(path), Counter())
    with pytest.raises(RowError, match="not a readable image"):
        store(root, verify="exists").put(pair("text.png"), Counter())
    monkeypatch.setattr(media_store, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(media_store.Image, "open", lambda *_: pytest.fail("was read"))
    with pytest.raises(RowError, match="bytes are over the limit of 100 for an image"):
        store(root).put(pair("a.png"), Counter())


def test_a_decoder_that_fails_in_any_way_costs_the_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_store, "load_image", lambda *_: {}["no such tag"])
    with pytest.raises(RowError, match="'a.png': cannot be decoded \\(KeyError"):
        store(root).put(pair("a.png"), Counter())
