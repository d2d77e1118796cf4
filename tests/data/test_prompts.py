# SPDX-License-Identifier: Apache-2.0
"""A prompt with references is the prompt with the media, and their pixels are those of the originals, fitted."""

import pytest
from PIL import Image

from embedrl_verl.data.media import MediaLimits, fit_image, load_image, load_item
from embedrl_verl.data.prompts import frames_of_file, load_prompt_media, prompt_messages
from embedrl_verl.data.schema import Item, Video, input_kind
from embedrl_verl.data.video import FrameTimes
from embedrl_verl.errors import MediaError
from embedrl_verl.tcot import build_prompt
from tests.data.clips import write_clip

LIMITS = MediaLimits(28)
FRAMES = tuple(f"{index}.png" for index in range(9))


def messages_of(record, side="query", **options):
    options = {"family": "qwen2_vl", "style": "paper", "few_shot": True, "max_frames": 8} | options
    return prompt_messages(record, side, **options)


def parts_of(messages, kind):
    return [part for message in messages for part in message["content"] if part["type"] == kind]


def without_media(messages):
    """The messages with every medium taken out, to compare all the rest."""
    return [
        {**message, "content": [{**part, "image": None, "video": None} for part in message["content"]]}
        for message in messages
    ]


@pytest.fixture
def clip_root(root):
    for index, name in enumerate(FRAMES):
        Image.new("RGB", (56, 84), (20 * index, 0, 0)).save(root / name)
    return root


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("style", ["paper", "compact"])
@pytest.mark.parametrize(
    "query",
    [
        Item(text="plain"),
        Item(text="two", images=("sub/b.png", "a.png")),
        Item(images=("a.png",), kind="page"),
        Item(text="clip", video=Video(frames=FRAMES, fps=3.0)),
    ],
)
def test_references_change_nothing_but_the_media(pair, clip_root, query, style, family):
    record = pair("p", query=query)
    loaded = load_item(record.item("query"), clip_root)
    direct = build_prompt(input_kind(record, "query"), loaded, family=family, style=style)
    by_reference = messages_of(record, style=style, family=family)
    assert without_media(by_reference) == without_media(direct)
    assert [part["image"] for part in parts_of(by_reference, "image")] == list(query.images)
    for part in parts_of(by_reference, "video"):
        assert part["video"] == [FRAMES[index] for index in (0, 1, 2, 3, 5, 6, 7, 8)]
        assert part["times"] == FrameTimes(3.0, (0, 1, 2, 3, 5, 6, 7, 8), 9)
    of_references = load_prompt_media(by_reference, LIMITS, str(clip_root))
    of_pixels = load_prompt_media(direct, LIMITS, None)
    assert [image.tobytes() for image in of_references[0] or ()] == [image.tobytes() for image in of_pixels[0] or ()]
    for (frames, metadata), (same, same_metadata) in zip(of_references[1] or (), of_pixels[1] or (), strict=True):
        assert (frames == same).all() and metadata == same_metadata


def test_bytes_stay_encoded_and_text_has_no_media(pair, png):
    data = png(7, width=100, height=60)
    messages = messages_of(pair("p", query=Item(images=(data,))))
    assert parts_of(messages, "image")[0]["image"] is data
    images, videos = load_prompt_media(messages, LIMITS, None)
    assert images is not None and images[0].size == (112, 56) and videos is None
    assert images[0].tobytes() == fit_image(load_image(data, None), LIMITS).tobytes()
    assert load_prompt_media(messages_of(pair("p")), LIMITS, None) == (None, None)


def test_the_target_prompt_does_not_see_the_query(pair):
    record = pair("p", query=Item(text="secret-query"), target=Item(text="open-target"))
    said = str(messages_of(record, "target"))
    assert "open-target" in said and "secret-query" not in said and "Find the answer." not in said


def test_odd_clip_is_padded_and_metadata_forbid_resampling(pair, clip_root):
    record = pair("p", query=Item(video=Video(frames=FRAMES[:3], fps=1.0)))
    _, ((frames, metadata),) = load_prompt_media(messages_of(record), LIMITS, str(clip_root))
    assert tuple(frames.shape) == (4, 3, 84, 56)
    assert (frames[3] == frames[2]).all() and not (frames[2] == frames[1]).all()
    assert metadata == {"fps": 1.0, "frames_indices": [0, 1, 2, 2], "total_num_frames": 4}


def test_frames_of_other_sizes_follow_the_first(pair, clip_root):
    record = pair("p", query=Item(video=Video(frames=("0.png", "sub/b.png"))))
    _, ((frames, _),) = load_prompt_media(messages_of(record), LIMITS, str(clip_root))
    assert tuple(frames.shape) == (2, 3, 84, 56)


def test_video_file_is_sampled_as_for_evidence(pair, tmp_path):
    write_clip(tmp_path / "c.mp4", "mpeg4", rate=10, pts=range(30))
    record = pair("p", query=Item(video=Video(path="c.mp4")))
    loaded = load_item(record.query, tmp_path)
    count = frames_of_file("c.mp4", None, LIMITS, str(tmp_path))
    messages = messages_of(record, file_frames=count)
    assert parts_of(messages, "video") == [{"type": "video", "video": "c.mp4", "fps": 2.0}]
    _, ((frames, metadata),) = load_prompt_media(messages, LIMITS, str(tmp_path))
    assert frames.shape[0] == len(loaded.frames) == count == 6
    assert loaded.times is not None and loaded.times.fps == pytest.approx(2.0)
    assert metadata == loaded.times.metadata()


def test_error_names_the_medium(pair, root):
    Image.new("RGB", (2010, 10)).save(root / "long.png")
    for name, reason in [("long.png", "factor of 200"), ("truncated.png", "not a readable image")]:
        for item in (Item(images=(name,)), Item(video=Video(frames=(name,)))):
            with pytest.raises(MediaError, match=f"'{name}': .*{reason}"):
                load_prompt_media(messages_of(pair("p", query=item)), LIMITS, str(root))
