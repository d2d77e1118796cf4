# SPDX-License-Identifier: Apache-2.0
"""A record as one card: what was searched for and what answers it, side by side, with what their T-CoTs point at.

Cards are made from views alone (`embedrl_verl.report.views`), so whoever has views, of a file or of a training run, can
show them. A box has the same name and colour in the picture, in the list below it and at the piece that is cut from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from embedrl_verl.report.html import Html, join, tag
from embedrl_verl.report.media import film_strip, pictures, piece_list
from embedrl_verl.report.pictures import PictureBook
from embedrl_verl.report.text import colour_class, marked, raw_tcot, tcot_parts
from embedrl_verl.report.views import BoxView, CardView, Facts, Flag, SideView, TcotView

KIND_NAMES = {
    "query_text": "text",
    "query_image": "image",
    "query_page": "page",
    "query_video": "video",
    "query_text_to_video": "text, looks for a video",
    "target_text": "text",
    "target_image": "image",
    "target_page": "page",
    "target_video": "video",
}
EVIDENCE_NAMES = {"text_keywords": "keywords", "bbox_2d": "boxes", "key_frames": "key frames"}
MAX_LISTED = 64
"""Boxes or keywords that are listed under a T-CoT."""
LONG_TEXT = 1500
"""Characters from which a text scrolls in a box of its own."""
COORDINATES = ("x1", "y1", "x2", "y2")


def render_card(card: CardView, book: PictureBook, number: int) -> Html:
    """The card's HTML.

    Args:
        book: encodes its pictures.
        number: of the card on its page, counted from 1; `#card-NUMBER` leads to it.
    """
    flags = card.all_flags()
    head = tag(
        "header",
        tag("h3", tag("a", f"{number}", href=f"#card-{number}", class_="anchor"), tag("span", card.title, dir="auto")),
        tag(
            "p",
            tag("span", card.source, class_="source"),
            tag("span", card.where),
            (tag("span", f"{name} {value}") for name, value in card.facts),
        ),
        tag("ul", *(badge(flag) for flag in flags), class_="badges") if flags else None,
    )
    sides = tag("div", *(_side(side, book) for side in card.sides), class_="sides") if card.sides else None
    more = None
    if card.more:
        inner = tag("div", *(_side(side, book) for side in card.more), class_="sides more")
        more = tag("details", tag("summary", _count(len(card.more), "hard negative")), inner, class_="negatives")
    return tag(
        "article",
        head,
        _flag_list(card.flags),
        sides,
        more,
        id=f"card-{number}",
        class_="card bad" if card.has_problem else "card",
        data_source=card.source,
        data_flags=" ".join(flag.code for flag in flags),
        data_fault="1" if card.has_problem else "0",
    )


def badge(flag: Flag) -> Html:
    """The flag's short name; its sentence shows on hovering and stands in full where it belongs."""
    return tag("li", flag.label, class_="badge note" if flag.is_note else "badge", title=flag.detail or None)


def _side(side: SideView, book: PictureBook) -> Html:
    keywords = list(dict.fromkeys(word for view in side.tcots for word in view.tcot.text_keywords))
    boxes = [box for view in side.tcots for box in view.boxes]
    media: list[Html | None] = []
    if side.item is not None:
        media = [pictures(side.item, boxes, book), film_strip(side, book)]
    class_, tab = ("text long", 0) if len(side.text) > LONG_TEXT else ("text", None)
    text = tag("p", marked(side.text, keywords), class_=class_, tabindex=tab, dir="auto") if side.text.strip() else None
    instruction = None
    if side.instruction.strip():
        instruction = tag(
            "p", tag("span", "Instruction ", class_="label"), marked(side.instruction, keywords), dir="auto"
        )
    kind = None if side.kind is None else KIND_NAMES[side.kind]
    notes = " · ".join(note for note in (kind, side.media_note) if note)
    return tag(
        "section",
        tag("h4", side.title, tag("span", notes, class_="kind") if notes else None),
        _flag_list(side.flags),
        instruction,
        text,
        media,
        _facts(side.facts),
        (_tcot(view, side, keywords, book) for view in side.tcots),
        tag("p", "No T-CoT.", class_="empty") if not side.tcots else None,
        class_="side",
    )


def _tcot(view: TcotView, side: SideView, keywords: Sequence[str], book: PictureBook) -> Html:
    tcot = view.tcot
    formed = "well formed" if tcot.is_well_formed else "not well formed"
    raw = tag(
        "details",
        tag("summary", f"As written, {len(tcot.text):,} characters"),
        raw_tcot(tcot),
        open=not (tcot.thinking or tcot.rethink or tcot.answer),
    )
    return tag(
        "div",
        tag("h4", view.title, tag("span", formed, class_="kind" if tcot.is_well_formed else "kind wrong")),
        _flag_list(view.flags),
        _facts(view.facts),
        tcot_parts(tcot),
        tag("div", *_evidence(view, side, keywords), class_="evidence"),
        piece_list(view.pieces, book),
        raw,
        class_="tcot",
    )


def _evidence(view: TcotView, side: SideView, keywords: Sequence[str]) -> Iterator[Html]:
    """What the T-CoT points at, in words; the evidence that the side's kind calls for is named if it is missing."""
    tcot = view.tcot
    if tcot.text_keywords:
        chips = []
        for word in list(dict.fromkeys(tcot.text_keywords))[:MAX_LISTED]:
            absent = word in view.missing_keywords
            told = "not in the text" if absent else None
            class_ = f"chip {'absent' if absent else colour_class(keywords.index(word))}"
            chips.append(tag("li", word, tag("small", f" {told}") if told else None, class_=class_, dir="auto"))
        yield tag("p", "Keywords", _more(len(set(tcot.text_keywords))), class_="label")
        yield tag("ul", *chips, class_="chips")
    if view.boxes:
        yield tag("p", "Boxes", _more(len(view.boxes)), class_="label")
        head = tag("tr", *(tag("th", name, scope="col") for name in ("box", "as written", "pixels", "")))
        rows = [_box_row(box, several=side.item is not None and len(side.item.images) > 1) for box in view.boxes]
        table = tag("table", tag("thead", head), tag("tbody", *rows[:MAX_LISTED]), class_="boxes")
        yield tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Boxes")
    if tcot.key_frames:
        frames = ", ".join(f"{view.prefix}{frame}" for frame in tcot.key_frames[:MAX_LISTED])
        yield tag("p", tag("span", "Key frames ", class_="label"), frames, _more(len(tcot.key_frames)))
    if side.required and not tcot.has_evidence(side.required):
        yield tag("p", f"No {EVIDENCE_NAMES[side.required]}, which this kind of input calls for.", class_="empty wrong")


def _box_row(box: BoxView, several: bool) -> Html:
    written = " ".join(f"{value:g}" for value in box.written)
    where = f"image {box.image}: " if several or box.image > 1 else ""
    pixels = "none"
    if box.pixels is not None:
        x1, y1, x2, y2 = box.pixels
        pixels = f"{where}{x1},{y1} to {x2},{y2} ({x2 - x1}×{y2 - y1})"
    name = tag("span", box.name, class_=f"dot {colour_class(box.colour)}")
    return tag(
        "tr",
        tag("th", name, tag("span", f" {box.label}", dir="auto") if box.label else None, scope="row"),
        tag("td", written, title=" ".join(COORDINATES)),
        tag("td", pixels),
        tag("td", f"left out: {box.status}" if box.status else "", class_="wrong" if box.status else None),
    )


def _flag_list(flags: Sequence[Flag]) -> Html | None:
    """Flags with their sentences, where they belong."""
    if not flags:
        return None
    rows = (
        tag(
            "li",
            tag("b", flag.label),
            f": {flag.detail}" if flag.detail else None,
            class_="note" if flag.is_note else None,
        )
        for flag in flags
    )
    return tag("ul", *rows, class_="flags")


def _facts(facts: Facts) -> Html | None:
    if not facts:
        return None
    return tag("dl", join(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="facts")


def _more(count: int) -> str | None:
    return f" (the first {MAX_LISTED} of {count:,})" if count > MAX_LISTED else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
