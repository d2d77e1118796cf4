# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from embedrl_verl.convert import media_store
from embedrl_verl.convert.converter import RowError
from embedrl_verl.convert.media_store import MediaStore
from embedrl_verl.data.media import load_image
from embedrl_verl.data.schema import Item, Media, PairRecord, Video
from tests.convert.conftest import Draw


def pair(*images: Media, video: Video | None = None, negatives: tuple[Item, ...] = ()) -> PairRecord:
    return PairRecord("p", "s", "", Item(text="q", images=images, video=video), Item(text="t"), "", negatives)


def write_video(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for index in range(frames):
            picture = np.full((64, 64, 3), 20 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def root(tmp_path: Path, draw: Draw) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a.png").write_bytes(draw(1))
    (folder / "b.jpeg").write_bytes(draw(2, "JPEG"))
    (folder / "text.png").write_bytes(b"no image")
    (folder / "torn.png").write_bytes(draw(3)[:-300])
    (folder / "noise.mp4").write_bytes(b"no video")
    write_video(folder / "clip.MP4", 6)
    (tmp_path / "outside.png").write_bytes(draw(4))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    return folder


def store(root: Path, place: str = "keep", verify: str = "decode") -> MediaStore:
    return MediaStore(place, verify, root, root.parent / "out")


def test_files_keep_their_bytes_under_their_hash_and_are_stored_once(root: Path, draw: Draw) -> None:
    files = store(root, "files")
    clip = Video(frames=("a.png", draw(5, "WEBP")), fps=2.0)
    counts = Counter()
    one = files.put(pair("a.png", draw(2, "JPEG"), video=clip), counts)
    two = files.put(pair("b.jpeg", negatives=(Item(images=("a.png",)),)), counts)
    media = root.parent / "out" / "media"
    assert one.query.images[0] == two.negatives[0].images[0]
    assert one.query.images[1] == two.query.images[0]  # bytes and file of the same content
    paths = [*one.query.images, *one.query.video.frames] if one.query.video else []
    for path, original in zip(paths, [draw(1), draw(2, "JPEG"), draw(1), draw(5, "WEBP")], strict=True):
        assert isinstance(path, str)
        assert (media / path).read_bytes() == original
        assert Path(path).stem == hashlib.sha256(original).hexdigest()
        assert load_image(path, media).tobytes() == load_image(original, None).tobytes()
    assert sorted(path.suffix for path in media.rglob("*.*")) == [".jpg", ".png", ".webp"]
    assert counts == Counter(images=4, frames=2, videos=1, paths=6)


def test_embedding_gives_the_bytes_of_the_files(root: Path, draw: Draw) -> None:
    counts = Counter()
    record = store(root, "embed").put(pair("a.png", video=Video(frames=("b.jpeg",))), counts)
    assert record.query.images == (draw(1),)
    assert record.query.video == Video(frames=(draw(2, "JPEG"),))
    assert counts["paths"] == 0


def test_keeping_changes_nothing(root: Path, draw: Draw) -> None:
    record = pair("a.png", draw(2), video=Video(path="clip.MP4"))
    counts = Counter()
    assert store(root).put(record, counts) is record
    assert (counts["images"], counts["videos"], counts["paths"]) == (2, 1, 2)
    assert not (root.parent / "out").exists()


def test_video_files_are_copied_as_they_are(root: Path) -> None:
    record = store(root, "files").put(pair(video=Video(path="clip.MP4", fps=2.0)), Counter())
    assert record.query.video is not None
    path = record.query.video.path
    assert path is not None
    assert path.endswith(".mp4")
    assert (root.parent / "out" / "media" / path).read_bytes() == (root / "clip.MP4").read_bytes()


@pytest.mark.parametrize("place", ["keep", "files", "embed"])
@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ("missing.png", "no such file in the media root"),
        ("../outside.png", "leaves the media root"),
        ("link.png", "leaves the media root"),
        ("/etc/hostname", "is absolute"),
        ("text.png", "not a readable image"),
        ("torn.png", "not a readable image"),
        (b"no image", "not a readable image"),
    ],
)
def test_unusable_media_are_named_with_their_field(root: Path, media: Media, reason: str, place: str) -> None:
    with pytest.raises(RowError, match=reason) as raised:
        store(root, place).put(pair("a.png", media), Counter())
    assert raised.value.field == "query.images[1]"
    assert not (root.parent / "out").exists()  # nothing is written of a record that is refused


def test_a_video_file_cannot_be_embedded(root: Path) -> None:
    with pytest.raises(RowError, match="a video file cannot be embedded; place media as files"):
        store(root, "embed").put(pair(video=Video(path="clip.MP4")), Counter())


def test_a_ribbon_that_no_model_reads_is_refused(root: Path, draw: Draw) -> None:
    with pytest.raises(RowError, match="sides may differ by a factor of 200 at most; got 1000x2"):
        store(root).put(pair(draw(0, width=1000, height=2)), Counter())


def test_a_file_too_large_for_an_image_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_store, "MAX_IMAGE_BYTES", 100)
    for reader in (Path, "read_bytes"), (media_store.Image, "open"):
        monkeypatch.setattr(*reader, lambda *_: pytest.fail("was read"))
    with pytest.raises(RowError, match="bytes are over the limit of 100 for an image"):
        store(root).put(pair("a.png"), Counter())


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_images_are_kept_and_counted(root: Path, draw: Draw, format: str) -> None:
    counts = Counter()
    moving = draw(0, format, frames=3)
    record = store(root).put(pair(moving, draw(0, format)), counts)
    assert record.query.images[0] == moving
    assert (counts["images"], counts["animated"]) == (2, 1)


def test_what_is_not_verified_is_not_opened(root: Path) -> None:
    lax = store(root, verify="none")
    assert lax.put(pair("missing.png", "text.png", b"no image"), Counter()).query.images[0] == "missing.png"
    for path in ("../outside.png", "/etc/hostname", "a/../../b"):
        with pytest.raises(RowError, match=r"must be relative to the media root, without '\.\.'"):
            lax.put(pair(path), Counter())


def test_headers_are_read_when_only_existence_is_verified(root: Path) -> None:
    shallow = store(root, verify="exists")
    shallow.put(pair("torn.png", video=Video(path="noise.mp4")), Counter())
    with pytest.raises(RowError, match="not a readable image"):
        shallow.put(pair("text.png"), Counter())
