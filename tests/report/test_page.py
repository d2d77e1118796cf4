# SPDX-License-Identifier: Apache-2.0
"""What a page shows is held by parsing it."""

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
from embedrl_verl.report.page import MIB, PageHead, render_page
from embedrl_verl.report.show import Examiner
from embedrl_verl.report.text import MAX_TEXT, json_apart, keywords_apart, tags_apart
from embedrl_verl.report.views import Flag
from tests.report.conftest import RECORDS, Seen, noise, png, tcot

READER = TcotReader("relative_1000", MediaLimits(28))
MEAN = "</p></script><script>owned = 1</script>\"' onerror=alert(1) javascript:alert(1) <img src=x> &amp; {{ 7 }} <!--"
ANY_TEXT = st.text(max_size=60) | st.sampled_from([MEAN, '{"a": [1]} <answer>', "<thinking>{}</thinking>"])


def card(record):
    return Examiner(READER, max_frames=8).card(LocatedPair("f.parquet", 0, record), "media")


def page_of(*records, max_mib=20, counts=()):
    return render_page(PageHead("Title", counts=counts), map(card, records), max_mib=max_mib)


def page_full_of(text):
    """The text in every place of a page that a record or a report can fill."""
    pointing = tcot({"text_keywords": [text], "bbox_2d": [[0, 0, 1, 900], [0, 0, 900, 900]]}, text)
    query = Item(text, (png(noise(0, 40, 30)),), instruction=text, tcot=pointing)
    made = card(PairRecord(text, text, text, query, Item(text, tcot=text), text, (query,), text))
    facts, flags = ((text, text),), (Flag("form", text), Flag("keyword", text))
    side, named = made.sides[0], {"facts": facts, "flags": flags}
    view = READER.view(pointing, side.item, side.kind, title=text, prefix=text, facts=facts)
    views = (view, replace(side.tcots[0], flags=flags, missing_keywords=(text,)))
    side = replace(side, title=text, tcots=views, media_note=text, **named)
    made = replace(made, where=text, sides=(side, made.sides[1]), **named)
    return Seen(render_page(PageHead(text, facts, ((text, 1),), (text,)), [made]).html)


@pytest.mark.parametrize("text", [MEAN, MEAN[::-1], "'\"`" * 9, "<![CDATA[<style><svg onload=x>]]>", "</title></pre>"])
def test_whatever_stands_in_a_record_is_only_shown(text):
    """The page has the elements, attributes and characters of one with harmless words, but for these words."""
    seen, harmless = page_full_of(text), page_full_of("word")

    def plain(shown):
        words = shown.replace(json.dumps(text)[1:-1], "word").replace(text, "word")
        return re.sub("[0-9]+ characters", "characters", words)

    for (name, found), (wanted_name, wanted) in zip(seen.elements, harmless.elements, strict=True):
        assert name == wanted_name and {key: plain(value) for key, value in found.items()} == wanted
    assert plain(seen.characters) == plain(harmless.characters) and seen.characters.count(text) > 30


@given(ANY_TEXT, st.lists(ANY_TEXT, max_size=3))
def test_texts_in_pieces_lose_nothing(text, keywords):
    for pieces in (keywords_apart(text, keywords), json_apart(text), tags_apart(text)):
        assert "".join(piece for piece, _ in pieces) == text


def test_the_page_is_whole_and_loads_nothing():
    html = page_of(*RECORDS, replace(RECORDS[5], pair_id="a\x00\ud800d")).html
    seen = Seen(html)
    assert "a\ufffd\ufffdd" in seen.characters and html.encode()
    loading = ("src", "href", "action", "data", "srcset", "style")
    for link in (value for _, one in seen.elements for name, value in one.items() if name in loading):
        assert re.match(r"data:image/(png|jpeg);base64,|#card-\d+$", link)
    assert all(one["alt"] and int(one["width"]) and int(one["height"]) for one in seen.all("img"))
    (policy,) = [one["content"] for one in seen.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for name in ("script", "style"):  # its own alone may run
        (program,) = re.findall(f"<{name}>(.*?)</{name}>", html, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() in policy and "url(" not in program


def test_boxes_are_drawn_in_pixels_of_their_own_image():
    boxes = tcot({"bbox_2d": [[100, 200, 500, 800], {"image": 2, "box": [0, 0, 500, 500]}, [0, 0, 9, 900]]})
    both = Item(images=(*RECORDS[0].query.images, png(noise(3, 100, 60))), tcot=boxes)
    seen = Seen(page_of(replace(RECORDS[0], query=both)).html)
    assert [one["viewbox"] for one in seen.all("svg")] == ["0 0 400 200", "0 0 100 60"]
    drawn = [tuple(int(one[key]) for key in ("x", "y", "width", "height")) for one in seen.all("rect", "line")]
    assert drawn == [(40, 40, 160, 120), (0, 0, 3, 180), (0, 0, 50, 30)]
    assert [one["class"] for one in seen.all("g")] == ["box c0", "box c2 out", "box c1"]
    assert [one["class"] for one in seen.all("span", "dot")] == [f"dot c{box}" for box in (0, 1, 2, 0, 1)]
    assert [one["alt"] for one in seen.all("img")][:2] == ["Image 1, boxes 1, 3", "Image 2, boxes 2"]
    assert "0,0 to 50,30 (50×30)" in seen.characters and "160×120 px, read at 168×112" in seen.characters


def test_key_frames_are_numbered_from_one_and_marked():
    html = page_of(RECORDS[2]).html
    film = re.findall(r"<li( class=\"key\")?><figure>.*?<b>(.*?)</b><span> (.*?)</span>", html, re.DOTALL)
    told = [("1", "0.0 s"), ("2 · key", "0.5 s"), ("3", "1.0 s"), ("4 · key", "1.5 s")]
    assert [(bool(key), *words) for key, *words in film] == [("key" in name, name, at) for name, at in told]
    assert re.findall(r'alt="Evidence (.*?),', html) == ["frame 4", "frame 2"]  # as written


def test_keywords_are_marked_where_they_stand():
    assert 'a <mark class="c0">red bus</mark>' in page_of(RECORDS[0]).html
    for text, keywords, marks in (
        ("A Red\n bus", ["red bus", "a"], [("A", 1), ("Red\n bus", 0)]),
        ("the red decker bus", ["red", "bus", "red decker"], [("red decker", 2), ("bus", 1)]),
        ("costs 1.5$ (net)", ["1.5$ (net)", ".*", " "], [("1.5$ (net)", 0)]),
    ):
        assert [piece for piece in keywords_apart(text, keywords) if piece[1] is not None] == marks


def test_problems_and_counts_can_be_seen_and_filtered():
    seen = Seen(page_of(*RECORDS, counts=(("vqa", 1200), ("unseen", 7))).html)
    flags = [(one["data-fault"], one["data-flags"]) for one in seen.all("article")]
    assert flags == [("0", "")] * 3 + [("1", "form no_evidence"), ("1", "no_tcot media"), ("0", "")]
    values = {one["value"] for one in seen.all("option")}
    assert {"flag:media", "vqa", "fault"} < values and "flag:units" not in values
    assert "is no folder; check the path" in seen.characters
    assert "unseen700videos010vqa1,20021all1,20762" in re.sub(r"\s", "", seen.characters)


def test_the_limit_of_the_file_holds_and_what_is_left_out_is_told():
    large = replace(RECORDS[0], query=Item(images=(png(noise(3, 900, 900)),) * 2))  # too much
    full, small = page_of(*RECORDS[:1] * 24), page_of(large, *RECORDS[:1] * 23, max_mib=0.5)
    assert len(full.html.encode()) > MIB and full.notes == ()
    assert len(small.html.encode()) <= MIB / 2 and small.cards == 24  # texts first
    absent = Seen(small.html).characters.count("left out to keep the page within its size")
    said = f"{absent} pictures are left out: the page has reached its limit of 0.5 MiB (--max-mib)."
    assert 2 < absent < 71 and small.notes == (said,) and said in small.html
    long = [replace(RECORDS[5], query=Item("Ж" * (MAX_TEXT + 1234)))] * 20
    late = page_of(*RECORDS[:1] * 9, *long[:10], max_mib=0.5)  # what later texts need goes from earlier pictures
    assert len(late.html.encode()) <= MIB / 2 and late.cards == 19
    tiny = page_of(*long, max_mib=0.25)
    assert len(tiny.html.encode()) <= MIB / 4 and f"{20 - tiny.cards} records are left out" in tiny.html
    assert 0 < tiny.html.count("Ж") == tiny.cards * MAX_TEXT and "1,234 more characters" in tiny.html
