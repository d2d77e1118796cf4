# SPDX-License-Identifier: Apache-2.0
"""One HTML file of cards: style, script and pictures inside, nothing from outside.

The page carries a content security policy with the hashes of its own style and script, so that even a hole in the
escaping could not run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from embedrl_verl import __version__
from embedrl_verl.report.card import render_card
from embedrl_verl.report.html import Html, join, raw_element, tag
from embedrl_verl.report.pictures import Budget, PictureBook
from embedrl_verl.report.views import FLAG_LABELS, NOTES, CardView, Facts

GENERATOR = "embedrl-verl"
MIB = 1 << 20
RESERVED = 64 * 1024
"""Bytes kept for what is not a card."""
TEXT_OF_CARD = 12 * 1024
"""Bytes that the text of a card is taken to need until one was seen."""
TEXT_MARGIN = 1.25
"""How much more than the mean of the cards so far is kept for the text of one to come."""
MIN_MIB = 0.25


@dataclass(frozen=True)
class PageHead:
    """What stands above the cards.

    Attributes:
        title: of the page.
        facts: how the records were chosen and read.
        counts: rows of the files by data source; what is shown is counted by the page itself.
        notes: sentences that a reader has to know.
    """

    title: str
    facts: Facts = ()
    counts: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A finished page: its text, and how many cards and pictures did not fit into the limit."""

    html: str
    cards: int
    faults: int
    left_out: int
    pictures_left_out: int


def render_page(
    head: PageHead,
    cards: Iterable[CardView],
    *,
    expected: int = 0,
    max_mib: float = 20.0,
    max_side: int = 640,
    late_notes: Callable[[], Sequence[str]] = tuple,
) -> Page:
    """Render cards until the limit is reached. Pictures that do not fit are left out first, then whole cards.

    Args:
        cards: taken one by one, so only the page is in memory.
        expected: how many cards there will be at most; room for the text of those to come is kept.
        max_mib: limit of the file in MiB, at least 0.25.
        max_side: longest side of a picture in the file, in pixels.
        late_notes: more sentences for the head, asked for when all cards are done.
    """
    room = int(max(max_mib, MIN_MIB) * MIB) - RESERVED
    rendered: list[Html] = []
    shown: Counter[str] = Counter()
    faulty: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    left_out = refused = text = 0
    for number, card in enumerate(cards, 1):
        mean_text = text / len(rendered) if rendered else TEXT_OF_CARD
        kept = int(TEXT_MARGIN * mean_text * max(1, expected - number + 1))
        body, pictures, missing = _fitting_card(card, len(rendered) + 1, max(0, room - kept), room, max_side)
        if body is None:
            left_out += 1
            continue
        refused += missing
        size = len(body.encode())
        text += size - pictures
        room -= size
        rendered.append(body)
        shown[card.source] += 1
        faulty[card.source] += card.has_problem
        flags.update(flag.code for flag in card.all_flags())
    faults = sum(faulty.values())
    notes = [*head.notes, *late_notes()]
    if left_out:
        notes.append(f"{left_out} records are left out: the page has reached its limit of {max_mib:g} MiB (--max-mib).")
    if refused:
        notes.append(f"{refused} pictures are left out for the page's limit of {max_mib:g} MiB (--max-mib).")
    top = [
        tag("h1", head.title),
        tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in head.facts), class_="facts"),
        (tag("p", note, class_="warning") for note in notes),
        _count_table(head.counts, shown, faulty),
        _filters(shown, flags, len(rendered), faults),
    ]
    empty = None if rendered else tag("p", "No record to show.", class_="empty")
    html = _document(head.title, join([tag("header", top, class_="top"), tag("main", empty, rendered)]))
    return Page(html, len(rendered), faults, left_out, refused)


def _fitting_card(card: CardView, number: int, pictures: int, room: int, max_side: int) -> tuple[Html | None, int, int]:
    """A card whose pictures have so many bytes at most, their bytes, and how many were refused.

    (None, 0, 0) if not even its text fits.
    """
    for allowed in (pictures, 0):
        budget = Budget(allowed)
        body = render_card(card, PictureBook(budget, max_side), number)
        if len(body.encode()) <= room:
            return body, allowed - budget.left, budget.refused
    return None, 0, 0


def _count_table(counts: Sequence[tuple[str, int]], shown: Counter[str], faulty: Counter[str]) -> Html:
    rows = dict(counts)
    names = sorted({*rows, *shown})
    header = ["data source", *(["rows"] if counts else []), "shown", "with a fault"]

    def line(name: str, total: int, *numbers: int, cell: str = "td") -> Html:
        values = [*([total] if counts else []), *numbers]
        return tag("tr", tag("th", name, scope="row"), (tag(cell, f"{value:,}") for value in values))

    body = [line(name, rows.get(name, 0), shown[name], faulty[name]) for name in names]
    total = line("all", sum(rows.values()), sum(shown.values()), sum(faulty.values()))
    table = tag(
        "table",
        tag("thead", tag("tr", (tag("th", name, scope="col") for name in header))),
        tag("tbody", body),
        tag("tfoot", total) if len(names) > 1 else None,
        class_="counts",
    )
    return tag("div", table, class_="scroll")


def _filters(shown: Counter[str], flags: Counter[str], cards: int, faults: int) -> Html:
    """Controls that the script shows; without a script every card is there to read."""
    sources = [tag("option", f"all sources ({cards})", value="")]
    sources += [tag("option", f"{name} ({count})", value=name) for name, count in sorted(shown.items())]
    states = [
        tag("option", "all records", value=""),
        tag("option", f"with a fault ({faults})", value="fault"),
        tag("option", f"without a fault ({cards - faults})", value="fine"),
    ]
    for code, label in FLAG_LABELS.items():
        if flags[code]:
            mark = "note: " if code in NOTES else ""
            states.append(tag("option", f"{mark}{label} ({flags[code]})", value=f"flag:{code}"))
    return tag(
        "form",
        tag("label", "Source ", tag("select", sources, name="source")),
        tag("label", "Problems ", tag("select", states, name="state")),
        tag("label", "Find ", tag("input", type="search", name="find", placeholder="id or text")),
        tag("output", f"{cards} of {cards}", name="count", aria_live="polite"),
        tag("span", "j, k: next, previous", class_="hint"),
        id="filter",
        hidden=True,
    )


def _document(title: str, body: Html) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        raw_element("style", style),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body, raw_element('script', script)), lang='en')}\n"


def _asset(name: str) -> str:
    text = resources.files("embedrl_verl.report").joinpath(name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
