# SPDX-License-Identifier: Apache-2.0
"""One HTML file of cards: style, script and pictures inside, nothing from outside.

A record may hold anything, `<script>` included; it can only ever be shown. Templates escape every value, and the page
carries a content security policy with the hashes of its own style and script, so that even a hole in the escaping could
not run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from embedrl_verl import __version__
from embedrl_verl.report import text
from embedrl_verl.report.pictures import encode, shown_at
from embedrl_verl.report.views import FAULTS, NOTES, CardView, Facts

GENERATOR = "embedrl-verl"
MIB = 1 << 20
RESERVED = 64 * 1024
"""Bytes kept for what is not a card."""
# Control characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_TEMPLATES = Environment(
    loader=PackageLoader("embedrl_verl.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_TEMPLATES.filters["thousands"] = "{:,}".format
_TEMPLATES.globals |= {"encode": encode, "shown_at": shown_at, "texts": text}


@dataclass(frozen=True)
class PageHead:
    """What stands above the cards: `facts` of how records were chosen and read, `counts` of the files' rows by data
    source (what is shown is counted by the page itself), `notes` that a reader has to know."""

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


def render_page(head: PageHead, cards: Iterable[CardView], *, max_mib: float = 20.0, max_side: int = 640) -> Page:
    """Render the cards that fit in `max_mib` (at least 0.25), no side of a picture over `max_side` pixels. Texts come
    first: pictures that do not fit are left out, a card's all together, and cards only if their texts do not fit."""
    room, embedded = int(max_mib * MIB) - RESERVED, 0
    kept: list[tuple[Markup, Markup | None, int]] = []  # without pictures, with them, how many
    shown, faulty, flags = Counter[str](), Counter[str](), Counter[str]()
    left_out = pictures_left_out = 0
    for view in cards:
        card = {"card": view, "number": len(kept) + 1}
        bare, full = _rendered("card", **card, max_side=0), None
        if _size(bare) > room:
            left_out += 1
            continue
        room -= _size(bare)
        pictures = bare.count('<span class="absent-picture">')  # quotes of a record are escaped
        if pictures and embedded < room:
            full = _rendered("card", **card, max_side=max_side)
            extra = _size(full) - _size(bare)
            embedded, full = (embedded + extra, full) if embedded + extra <= room else (embedded, None)
        kept.append((bare, full, pictures))
        shown[view.source] += 1
        faulty[view.source] += view.has_fault
        flags.update(flag.code for flag in view.all_flags())
    fitting = []
    for bare, full, count in kept:  # only now it is known what the texts need
        extra = 0 if full is None else _size(full) - _size(bare)
        if full is None or extra > room:
            pictures_left_out += count
            fitting.append(bare)
        else:
            room -= extra
            fitting.append(full)
    notes = [
        f"{count} {what} are left out: the page has reached its limit of {max_mib:g} MiB (--max-mib)."
        for count, what in ((left_out, "records"), (pictures_left_out, "pictures"))
        if count
    ]
    rows = dict(head.counts)
    style, script = _asset("page.css"), _asset("page.js")
    html = _rendered(
        "page",
        head=head,
        notes=[*head.notes, *notes],
        counts=[(name, rows.get(name, 0), shown[name], faulty[name]) for name in sorted({*rows, *shown})],
        total=("all", sum(rows.values()), len(kept), faulty.total()),
        flags=[(f"flag:{code}", label, flags[code]) for code, label in (FAULTS | NOTES).items() if flags[code]],
        cards=fitting,
        generator=f"{GENERATOR} {__version__}",
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
    )
    return Page(str(html), len(kept), faulty.total(), left_out, pictures_left_out)


def _rendered(name: str, **values: Any) -> Markup:
    return Markup(_UNPRINTABLE.sub("\ufffd", _TEMPLATES.get_template(f"{name}.html.jinja").render(values)))


def _size(html: str) -> int:
    return len(html.encode())


def _asset(name: str) -> Markup:
    return Markup(resources.files("embedrl_verl.report").joinpath(name).read_text(encoding="utf-8"))


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
