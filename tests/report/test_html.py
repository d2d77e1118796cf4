# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedrl_verl.report.html import Html, escape, join, raw_element, tag
from embedrl_verl.report.text import marked, raw_tcot, tcot_parts
from embedrl_verl.tcot import parse_tcot
from tests.report.inputs import Seen

ANY_TEXT = st.text(st.characters(blacklist_categories=())) | st.sampled_from(
    ["<script>", "</mark>", "\"'><b", "&lt;", "<!--"]
)


@given(ANY_TEXT, ANY_TEXT)
def test_text_stays_text_whatever_it_is(text: str, value: str) -> None:
    html = tag("p", text, [text, Html("<br>"), None], title=value)
    seen = Seen(html)
    assert [name for name, _ in seen.elements] == ["p", "br"]
    assert seen.characters == Seen(escape(text)).characters * 2
    assert list(seen.elements[0][1]) == ["title"]
    html.encode()  # no half of a surrogate pair


@given(ANY_TEXT, st.lists(ANY_TEXT, max_size=3))
def test_marks_and_parts_add_no_other_element_and_lose_no_text(text: str, keywords: list[str]) -> None:
    seen = Seen(marked(text, keywords))
    assert {name for name, _ in seen.elements} <= {"mark"}
    assert seen.characters == Seen(escape(text)).characters
    parsed = parse_tcot(f"<thinking>{text}</thinking><answer>{keywords}</answer>")
    allowed = {"section", "h5", "p", "code", "pre", "b"}
    assert {name for name, _ in Seen(tcot_parts(parsed) + raw_tcot(parsed)).elements} <= allowed
    assert Seen(raw_tcot(parsed)).characters == Seen(escape(parsed.text)).characters


def test_attributes_that_are_no_text() -> None:
    assert tag("a", class_="x", data_source="s", hidden=True, open=False, title=None, x=1.5) == (
        '<a class="x" data-source="s" hidden x="1.5"></a>'
    )
    assert tag("img", src="u") == '<img src="u">'
    assert join(["a", ["b", [Html("<i>")]]]) == "ab<i>"


def test_programs_come_only_through_their_own_door() -> None:
    with pytest.raises(ValueError):
        tag("script", "alert(1)")
    with pytest.raises(ValueError):
        raw_element("script", "var a = '</script>'")
    with pytest.raises(ValueError):
        raw_element("p", "text")
    assert raw_element("style", "p{}") == "<style>p{}</style>"
