# SPDX-License-Identifier: Apache-2.0
"""What a page shows is held by parsing it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.table import LocatedPair
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.examine import Examiner
from embedrl_verl.report.page import MIB, Page, PageHead, render_page
from embedrl_verl.report.text import MAX_TEXT, json_apart, keywords_apart, tags_apart
from embedrl_verl.report.views import CardView, Flag
from tests.report.conftest import Seen, noise, png, tcot

READER = TcotReader("relative_1000", MediaLimits(28))
MEAN = "</p></script><script>owned = 1</script>\"' onerror=alert(1) javascript:alert(1) <img src=x> &amp; {{ 7 }} <!--"
ANY_TEXT = st.text(max_size=60) | st.sampled_from([MEAN, '{"a": [1]} <answer>', "<thinking>{}</thinking>"])


def card(record: PairRecord, row: int = 0) -> CardView:
    return Examiner(READER, max_frames=8).card(LocatedPair("f.parquet", row, record), "media")


@pytest.fixture
def cards(records: list[PairRecord]) -> dict[str, CardView]:
    return {record.pair_id: card(record, row) for row, record in enumerate(records)}


def page_of(*cards: CardView, max_mib: float = 20) -> Page:
    return render_page(PageHead("Title", (("files", "f"),)), cards, max_mib=max_mib)


def page_full_of(text: str) -> Seen:
    """The text in every place of a page that a record or a report can fill."""
    pointing = tcot({"text_keywords": [text], "bbox_2d": [[0, 0, 1, 900], [0, 0, 900, 900]]}, text)
    query = Item(text, (png(noise(0, 40, 30)),), instruction=text, tcot=pointing)
    made = card(PairRecord(text, text, text, query, Item(text, tcot=text), text, (query,), text))
    facts, flags = ((text, text),), (Flag("form", text), Flag("keyword", text))
    side = made.sides[0]
    views = (
        READER.view(pointing, side.item, side.kind, title=text, prefix=text, facts=facts),
        replace(side.tcots[0], flags=flags, missing_keywords=(text,)),
    )
    side = replace(side, title=text, tcots=views, media_note=text, facts=facts, flags=flags)
    made = replace(made, where=text, sides=(side, made.sides[1]), facts=facts, flags=flags)
    return Seen(render_page(PageHead(text, facts, ((text, 1),), (text,)), [made]).html)


@pytest.mark.parametrize("text", [MEAN, MEAN[::-1], "'\"`" * 9, "<![CDATA[<style><svg onload=x>]]>", "</title></pre>"])
def test_whatever_stands_in_a_record_is_only_shown(text: str) -> None:
    """The page has the elements, attributes and characters of one with harmless words, but for these words."""
    seen, harmless = page_full_of(text), page_full_of("word")

    def plain(shown: str) -> str:
        words = shown.replace(json.dumps(text)[1:-1], "word").replace(text, "word")
        return re.sub("[0-9]+ characters", "characters", words)

    for (name, found), (wanted_name, wanted) in zip(seen.elements, harmless.elements, strict=True):
        assert name == wanted_name and {key: plain(value) for key, value in found.items()} == wanted
    assert plain(seen.characters) == plain(harmless.characters) and seen.characters.count(text) > 30


@given(ANY_TEXT, st.lists(ANY_TEXT, max_size=3))
def test_texts_in_pieces_lose_nothing(text: str, keywords: list[str]) -> None:
    for pieces in (keywords_apart(text, keywords), json_apart(text), tags_apart(text)):
        assert "".join(piece for piece, _ in pieces) == text


def test_the_page_is_whole_and_loads_nothing(cards: dict[str, CardView]) -> None:
    html = page_of(*cards.values(), replace(cards["bare"], title="a\x00\ud800d")).html
    seen = Seen(html)
    assert seen.open == [] and "a\ufffd\ufffdd" in seen.characters and html.encode()
    loading = ("src", "href", "action", "data", "srcset", "style")
    links = [value for _, one in seen.elements for name, value in one.items() if name in loading]
    assert links and all(re.match(r"data:image/(png|jpeg);base64,|#card-\d+$", link) for link in links)
    assert all(one["alt"] and int(one["width"]) and int(one["height"]) for one in seen.all("img"))
    (policy,) = [one["content"] for one in seen.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for name in ("script", "style"):  # its own alone may run
        (program,) = re.findall(f"<{name}>(.*?)</{name}>", html, re.DOTALL)
        assert f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()}'" in policy
        assert "url(" not in program and "@import" not in program


def test_boxes_are_drawn_in_pixels_of_their_own_image(records: list[PairRecord]) -> None:
    query = records[0].query
    boxes = tcot({"bbox_2d": [[100, 200, 500, 800], {"image": 2, "box": [0, 0, 500, 500]}, [0, 0, 9, 900]]})
    both = replace(query, images=(query.images[0], png(noise(3, 100, 60))), tcot=boxes)
    seen = Seen(page_of(card(replace(records[0], query=both))).html)
    assert [one["viewbox"] for one in seen.all("svg")] == ["0 0 400 200", "0 0 100 60"]
    drawn = [tuple(int(one[key]) for key in ("x", "y", "width", "height")) for one in seen.all("rect", "line")]
    assert drawn == [(40, 40, 160, 120), (0, 0, 3, 180), (0, 0, 50, 30)]
    assert [one["class"] for one in seen.all("g")] == ["box c0", "box c2 out", "box c1"]
    assert [one["class"] for one in seen.all("span", "dot")] == [f"dot c{box}" for box in (0, 1, 2, 0, 1)]
    assert [one["alt"] for one in seen.all("img")][:2] == ["Image 1, boxes 1, 3", "Image 2, boxes 2"]
    assert "image 2: 0,0 to 50,30 (50×30)" in re.sub(r"\s+", " ", seen.characters)
    assert "160×120 px, read at 168×112" in seen.characters


def test_key_frames_are_numbered_from_one_and_marked(cards: dict[str, CardView]) -> None:
    html = page_of(cards["clip"]).html
    film = html[html.index('<ol class="film">') :].split("</ol>")[0]
    assert [bool(key) for key in re.findall(r"<li( class=\"key\")?>", film)] == [False, True, False, True]
    told = [("1", "0.0 s"), ("2 · key", "0.5 s"), ("3", "1.0 s"), ("4 · key", "1.5 s")]
    assert re.findall(r"<b>(.*?)</b><span> (.*?)</span>", film) == told
    assert re.findall(r'alt="Evidence (.*?),', html) == ["frame 4", "frame 2"]  # as written


def test_keywords_are_marked_where_they_stand(cards: dict[str, CardView]) -> None:
    def marks(text: str, keywords: list[str]) -> list[tuple[int, str]]:
        return [(number, piece) for piece, number in keywords_apart(text, keywords) if number is not None]

    assert 'a <mark class="c0">red bus</mark>' in page_of(cards["image"]).html
    assert marks("A Red\n bus", ["red bus", "a"]) == [(1, "A"), (0, "Red\n bus")]
    assert marks("the red decker bus", ["red", "bus", "red decker"]) == [(2, "red decker"), (1, "bus")]
    assert marks("costs 1.5$ (net)", ["1.5$ (net)", ".*", " "]) == [(0, "1.5$ (net)")]


def test_problems_and_counts_can_be_seen_and_filtered(cards: dict[str, CardView]) -> None:
    page = render_page(PageHead("T", counts=(("vqa", 1200), ("unseen", 7))), cards.values())
    seen = Seen(page.html)
    assert page.faults == 2 and [one["data-fault"] for one in seen.all("article")] == list("000110")
    flags = [one["data-flags"] for one in seen.all("article")]
    assert flags == ["", "", "", "form no_evidence", "no_tcot media", ""]
    values = [one["value"] for one in seen.all("option")]
    assert "flag:media" in values and "flag:units" not in values and "vqa" in values
    assert "is no folder; check the path" in seen.characters
    counts = re.sub(r"\s", "", seen.characters)
    assert "unseen700videos010vqa1,20021all1,20762" in counts


def test_the_limit_of_the_file_holds_and_what_is_left_out_is_told(records: list[PairRecord]) -> None:
    many = [card(records[0], row) for row in range(24)]
    full, small = page_of(*many), page_of(*many, max_mib=0.5)
    assert len(full.html.encode()) > MIB and full.pictures_left_out == full.left_out == 0
    assert len(small.html.encode()) <= MIB / 2
    assert small.cards == 24 and small.left_out == 0  # texts first
    assert 0 < small.pictures_left_out < 72 and f"{small.pictures_left_out} pictures are left out" in small.html
    assert Seen(small.html).characters.count("left out to keep the page within its size") == small.pictures_left_out
    long = card(replace(records[5], query=Item("Ж" * (MAX_TEXT + 1234))))
    tiny = page_of(*[long] * 20, max_mib=0.25)
    assert len(tiny.html.encode()) <= MIB / 4 and tiny.cards + tiny.left_out == 20 and tiny.left_out > 0
    assert f"{tiny.left_out} records are left out" in tiny.html
    assert tiny.html.count("Ж") == tiny.cards * MAX_TEXT and "1,234 more characters" in tiny.html
