# SPDX-License-Identifier: Apache-2.0
"""What a page shows is held by parsing it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.examine import Examiner
from embedrl_verl.report.page import MIB, Page, PageHead, render_page
from embedrl_verl.report.rows import Row
from embedrl_verl.report.views import CardView, Flag
from tests.report.inputs import MEAN_TEXT, Seen, noise, png, tcot

READER = TcotReader("relative_1000", MediaLimits(28))


def card(record: PairRecord, row: int = 0) -> CardView:
    return Examiner(READER, max_frames=8).card(Row(Path("f.parquet"), row, record, "media"))


@pytest.fixture
def cards(records: list[PairRecord]) -> dict[str, CardView]:
    return {record.pair_id: card(record, row) for row, record in enumerate(records)}


def page_of(*cards: CardView, max_mib: float = 20) -> Page:
    return render_page(PageHead("Title", (("files", "f"),)), cards, expected=len(cards), max_mib=max_mib)


def test_the_page_is_balanced_and_loads_nothing(cards: dict[str, CardView]) -> None:
    seen = Seen(page_of(*cards.values()).html)
    assert not seen.unbalanced
    links = [
        value for _, one in seen.elements for name, value in one.items() if name in ("src", "href", "action", "data")
    ]
    assert links and all(
        link is not None and re.match(r"data:image/(png|jpeg);base64,|#card-\d+$", link) for link in links
    )
    assert not any(name.startswith("on") or name == "style" for _, one in seen.elements for name in one)
    assert "url(" not in seen.programs["style"] and "@import" not in seen.programs["style"]
    ids = [one["id"] for _, one in seen.elements if "id" in one]
    assert len(set(ids)) == len(ids)


def test_only_its_own_style_and_script_may_run(cards: dict[str, CardView]) -> None:
    seen = Seen(page_of(*cards.values()).html)
    (policy,) = [one["content"] for one in seen.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for name in ("script", "style"):
        assert len(seen.all(name)) == 1
        digest = base64.b64encode(hashlib.sha256(seen.programs[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_a_record_full_of_html_is_only_shown(cards: dict[str, CardView]) -> None:
    clean, mean = Seen(page_of(cards["bare"]).html), Seen(page_of(cards[MEAN_TEXT]).html)
    assert len(mean.all("script")) == len(clean.all("script")) == 1
    assert not mean.all("img") and not mean.unbalanced
    assert mean.programs == clean.programs
    assert mean.characters.count(MEAN_TEXT) >= 6  # id, source, both texts, T-CoT, keyword


def test_boxes_are_drawn_in_pixels_of_the_original(cards: dict[str, CardView]) -> None:
    seen = Seen(page_of(cards["image"]).html)
    (svg,) = seen.all("svg")
    assert svg["viewbox"] == "0 0 400 200" and svg["aria-hidden"] == "true"
    drawn = [tuple(int(one[key] or 0) for key in ("x", "y", "width", "height")) for one in seen.all("rect", "line")]
    assert drawn == [(40, 40, 160, 120), (240, 0, 160, 100)]
    assert [one["class"] for one in seen.all("g")] == ["box c0", "box c1"]
    assert [one["class"] for one in seen.all("span", "dot")] == ["dot c0", "dot c1"] * 2  # table, pieces
    assert "2 stop sign" in seen.characters and "40,40 to 200,160 (160×120)" in seen.characters
    assert seen.all("img")[0]["alt"] == "Image 1 with boxes 1, 2"


def test_a_box_is_drawn_in_its_own_image(records: list[PairRecord]) -> None:
    query = records[0].query
    boxes = tcot({"bbox_2d": [{"image": 2, "box": [0, 0, 500, 500]}]})
    both = replace(query, images=(query.images[0], png(noise(3, 100, 60))), tcot=boxes)
    seen = Seen(page_of(card(replace(records[0], query=both))).html)
    assert [one["viewbox"] for one in seen.all("svg")] == ["0 0 100 60"]
    assert [one["alt"] for one in seen.all("img")][:2] == ["Image 1", "Image 2 with box 1"]
    assert "image 2: 0,0 to 50,30" in seen.characters


def test_key_frames_are_numbered_from_one_and_marked(cards: dict[str, CardView]) -> None:
    html = page_of(cards["clip"]).html
    film = html[html.index('<ol class="film">') :].split("</ol>")[0]
    assert [bool(key) for key in re.findall(r"<li( class=\"key\")?>", film)] == [False, True, False, True]
    assert re.findall(r"<b>(.*?)</b><span>(.*?)</span>", film) == [
        ("1", " 0.0 s"),
        ("2 · key", " 0.5 s"),
        ("3", " 1.0 s"),
        ("4 · key", " 1.5 s"),
    ]
    assert re.findall(r'alt="Evidence (.*?),', html) == ["frame 4", "frame 2"]  # as written


def test_every_picture_says_what_it_is(cards: dict[str, CardView]) -> None:
    for one in Seen(page_of(*cards.values()).html).all("img"):
        assert one["alt"] and int(one["width"] or 0) > 0 and int(one["height"] or 0) > 0


def test_keywords_are_marked_in_the_text_they_point_at(cards: dict[str, CardView]) -> None:
    html = page_of(cards["image"]).html
    assert 'a <mark class="c0" title="keyword 1">red bus</mark>' in html


def test_problems_are_badges_and_can_be_filtered(cards: dict[str, CardView]) -> None:
    page = page_of(*cards.values())
    seen = Seen(page.html)
    found = {one["id"]: one["data-flags"] for one in seen.all("article")}
    assert found["card-1"] == "" and found["card-5"] == "no_tcot media"
    assert set((found["card-4"] or "").split()) == {"form", "no_evidence"}
    assert page.faults == 2 and [one["data-fault"] for one in seen.all("article")] == list("000110")
    values = [one["value"] for one in seen.all("option")]
    assert "flag:media" in values and "flag:units" not in values and "vqa" in values
    assert "is no folder; check the path" in seen.characters


def test_counts_by_source_stand_at_the_top(records: list[PairRecord]) -> None:
    head = PageHead("T", counts=(("vqa", 1200), ("unseen", 7)))
    html = render_page(head, [card(records[0])]).html
    cells = re.sub(r"<[^>]+>", " ", html[html.index("<tbody>") : html.index("</table>")]).split()
    assert cells == ["unseen", "7", "0", "0", "vqa", "1,200", "1", "0", "all", "1,207", "1", "0"]


def test_the_limit_of_the_file_holds_and_what_is_left_out_is_told(records: list[PairRecord]) -> None:
    many = [card(records[0], row) for row in range(24)]
    full, small = page_of(*many), page_of(*many, max_mib=0.5)
    assert len(full.html.encode()) > MIB and full.pictures_left_out == full.left_out == 0
    assert len(small.html.encode()) <= MIB / 2
    assert small.cards == 24 and small.left_out == 0  # texts first
    assert 0 < small.pictures_left_out < 72
    assert f"{small.pictures_left_out} pictures are left out" in small.html
    assert (
        Seen(small.html).characters.count("left out to keep the page within its size limit") == small.pictures_left_out
    )
    tiny = page_of(*[card(records[3], row) for row in range(200)], max_mib=0.25)
    assert len(tiny.html.encode()) <= MIB / 4 and tiny.cards + tiny.left_out == 200 and tiny.left_out > 0
    assert f"{tiny.left_out} records are left out" in tiny.html


def test_several_tcots_of_one_side_share_its_picture(records: list[PairRecord]) -> None:
    """As a report of a training run shows them, before and after."""
    whole = card(records[0])
    side = whole.sides[0]
    views = tuple(
        READER.view(tcot({"bbox_2d": box}), side.item, side.kind, title=title, prefix=prefix, facts=(("rank", rank),))
        for title, prefix, box, rank in (
            ("Before", "A", [0, 0, 500, 500], "7"),
            ("After", "B", [500, 0, 900, 900], "1"),
        )
    )
    shown = replace(whole, sides=(replace(side, tcots=views, flags=(Flag("too_long", "x"),)),))
    seen = Seen(page_of(shown).html)
    assert len(seen.all("svg")) == 1 and len(seen.all("rect", "line")) == 2
    for text in ("Before", "After", "A1", "B1", "too long: x"):
        assert text in seen.characters
