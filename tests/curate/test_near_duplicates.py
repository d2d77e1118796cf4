# SPDX-License-Identifier: Apache-2.0
"""Copies of an image are put together, other images are not, however alike they look."""

import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from embedrl_verl.curate.near_duplicates import Likeness, close_hashes, representatives, write_looks
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, Video
from tests.curate.conftest import fill, pair, rejected, write_parts

LINE = "revenue grew by the end of the third quarter while costs of materials fell and margins rose again in Europe"


def page(seed, number=""):
    """A page of print under a common title; `number` replaces one word."""
    choose = np.random.default_rng(seed)
    image = Image.new("RGB", (600, 800), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    pen.rectangle((0, 0, 600, 50), fill=(20, 40, 120))
    pen.text((20, 15), "Annual report", font=font, fill="white")
    for y in range(80, 760, 22):
        if choose.random() < 0.85:
            pen.text((50, y), " ".join(choose.choice(LINE.split(), 9)), font=font, fill="black")
    if number:
        pen.rectangle((100, 240, 180, 262), fill="white")
        pen.text((102, 241), number, font=font, fill="black")
    return image


def photo(seed):
    colours = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((480, 360), Image.Resampling.BICUBIC)


def saved(image, quality=None):
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if quality is None else "JPEG", quality=quality or 0)
    return buffer.getvalue()


def half(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def groups_of(images, likeness=None):
    """The groups of more than one image, as sets of positions."""
    digests = [hashlib.sha256(content).digest() for content in images]
    looked = ((digest, Image.open(io.BytesIO(one)).convert("RGB")) for digest, one in zip(digests, images, strict=True))
    write_looks(Path("looks"), looked)
    stands, found = representatives([Path("looks")], likeness or Likeness()), {}
    for place, digest in enumerate(digests):
        if digest in stands:
            found.setdefault(stands[digest], set()).add(place)
    for first, members in found.items():
        assert first == min(digests[place] for place in members)
    return sorted(found.values(), key=min)


@pytest.mark.parametrize("draw", [page, photo])
def test_copies_at_other_quality_size_and_contrast_are_one_group_in_any_order(draw):
    images = []
    for image in map(draw, range(4)):
        paler = image.point(lambda value: value * 0.8 + 20)
        images += [saved(image), saved(paler, 90), saved(image, 30), saved(half(image)), saved(half(image), 80)]
    assert groups_of(images) == [set(range(start, start + 5)) for start in range(0, 20, 5)]
    order = np.random.default_rng(1).permutation(20).tolist()
    shuffled = groups_of([images[place] for place in order])
    assert sorted(sorted(order[place] // 5 for place in group) for group in shuffled) == [[n] * 5 for n in range(4)]


def test_pages_of_one_template_and_pages_with_one_other_number_stay_apart():
    images = [saved(page(seed)) for seed in range(8)]
    images += [saved(page(seed, number)) for seed in range(4) for number in ("1,234", "98.7%")]
    assert groups_of(images) == []
    # the hash alone puts a page together with its edited copies: the comparison of pictures is what keeps them apart
    assert groups_of(images, Likeness(12, 255)) != []


def test_blank_images_and_other_shapes_are_nobodys_near_duplicates():
    blank = [saved(Image.new("RGB", (64, 64), colour)) for colour in ("white", "#fefefe", "black")]
    faint = photo(2).point(lambda value: 245 + value // 32)
    squeezed = photo(1).resize((480, 300))
    assert groups_of([*blank, *map(saved, (faint, faint.convert("RGBA"), photo(1), squeezed))]) == []


def test_the_search_finds_every_pair_of_close_hashes():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (60, 256), dtype=np.uint8)
    for place in range(1, 60, 2):  # odd ones are even ones with 0..14 bits turned
        bits[place] = bits[place - 1]
        bits[place, random.choice(256, place // 4, replace=False)] ^= 1
    for limit in (0, 3, 12, 20):
        blocks = close_hashes(np.packbits(bits, axis=1), limit)
        found = {tuple(sorted(ends)) for block in blocks for ends in zip(*block, strict=True)}
        pairs = itertools.combinations(range(60), 2)
        wanted = {(one, other) for one, other in pairs if (bits[one] != bits[other]).sum() <= limit}
        assert found == wanted and len(wanted) > 1


def test_near_duplicate_targets_share_an_id_of_their_content():
    pages = [saved(page(0)), saved(page(0), 50), saved(page(1)), b"no image"]
    targets = [
        Item(text="t", images=(pages[0],)),
        Item(text="T", images=(pages[1],)),  # a copy with the same text
        Item(text="u", images=(pages[1],)),  # a copy with another text
        Item(text="t", images=(pages[0], pages[3])),  # no image: left out
        Item(text="t", images=(pages[2],)),
        Item(video=Video(frames=(pages[0], pages[2]))),
        Item(video=Video(frames=(pages[1], pages[2]))),
        Item(video=Video(frames=(pages[2], pages[1]))),  # the same frames in another order
    ]
    files = write_parts("in", [pair(f"p{i}", target=target) for i, target in enumerate(targets)], [3])
    found = report, records = fill(files, "one", near=Likeness(), max_bad_share=0.2)
    assert fill(files, "two", near=Likeness(), max_bad_share=0.2, workers=2) == found
    ids = [record.target_id for record in records]
    assert ids[0] == ids[1] and ids[4] == ids[5] and len(set(ids)) == 5
    assert [record.target for record in records] == targets[:3] + targets[4:]
    assert [(line["row"], line["field"]) for line in rejected("one")] == [(0, "target.images[1]")]
    assert [report.values[name] for name in ("rejected", "near_groups", "near_media")] == [1, 1, 6]
    assert report.values["sources"]["s"]["near"] == 6
    exact, same = fill(files, "exact")
    assert exact.values["sources"]["s"]["contents"] == 8
    first = min(pages[:2], key=lambda content: hashlib.sha256(content).digest())
    assert [same[pages.index(first)].target_id, same[4].target_id] == [ids[0], ids[3]]  # of the group's first member
    (group,) = map(json.loads, Path("one/near_duplicates.jsonl").read_text().splitlines())
    listed = [(line["pair_id"], line["medium"].removeprefix("target.")) for line in group["members"]]
    assert listed[:3] == [(f"p{i}", "images[0]") for i in range(3)] and group["media"] == 6
    assert listed[3:] == [("p5", "video.frames[0]"), ("p6", "video.frames[0]"), ("p7", "video.frames[1]")]
    together = [record.pair_id for record in read_pairs("one/near_duplicates.parquet")]
    assert together == [name for name, _ in listed]
