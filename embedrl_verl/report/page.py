# SPDX-License-Identifier: Apache-2.0
"""One HTML file of cards: style, script and pictures inside, nothing from outside.

A record may hold anything, `<script>` included; it can only ever be shown. Templates escape every value, and the page
carries a content security policy with the hashes of its own style and script, so that even a hole in the escaping could
not run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from embedrl_verl import __version__
from embedrl_verl.report import text
from embedrl_verl.report.views import FAULTS, NOTES, CardView, Facts

GENERATOR = "embedrl-verl"
MIB = 1 << 20
RESERVED = 64 * 1024
"""Bytes kept for what is not a card."""
QUALITY = 82
MAX_PNG_PIXELS = 128 * 128
"""Up to here PNG costs little, and loses nothing."""
MAX_ENLARGED = 3.0
# Control characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_TEMPLATES = Environment(
    loader=PackageLoader("embedrl_verl.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class PageHead:
    """What stands above the cards: `facts` of how records were chosen and read, `counts` of the files' rows by data
    source (what is shown is counted by the page itself), `notes` that a reader has to know, and a `rendered` body."""

    title: str
    facts: Facts = ()
    counts: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()
    body: str = ""


@dataclass(frozen=True)
class Page:
    """A finished page: its text, how many cards it has and how many of them have a fault, and what did not fit."""

    html: str
    cards: int
    faults: int
    notes: tuple[str, ...]


def render_page(head: PageHead, cards: Iterable[CardView], *, max_mib: float = 20.0, max_side: int = 640) -> Page:
    """Render the cards that fit in `max_mib` (at least 0.25), no side of a picture over `max_side` pixels. Texts come
    first: pictures that do not fit are left out, a card's all together, and cards only if their texts do not fit."""
    room, embedded = int(max_mib * MIB) - RESERVED, 0
    kept: list[tuple[Markup, Markup, int]] = []  # without pictures, with them if they may fit, how many
    shown, faulty, flags = Counter[str](), Counter[str](), Counter[str]()
    left_out = pictures_left_out = 0
    for view in cards:
        card = {"card": view, "number": len(kept) + 1}
        bare = full = rendered("card", **card, max_side=0)
        if _size(bare) > room:
            left_out += 1
            continue
        room -= _size(bare)
        pictures = bare.count('<span class="absent-picture">')  # quotes of a record are escaped
        if pictures and embedded < room:
            tried = rendered("card", **card, max_side=max_side)
            if (extra := _size(tried) - _size(bare)) <= room - embedded:
                full, embedded = tried, embedded + extra
        kept.append((bare, full, pictures))
        shown[view.source] += 1
        faulty[view.source] += view.has_fault
        flags.update(flag.code for flag in view.all_flags())
    fitting = []
    for bare, full, pictures in kept:  # only now it is known what the texts need
        extra = _size(full) - _size(bare)
        fitting.append(full if extra <= room else bare)
        room -= extra if extra <= room else 0
        pictures_left_out += pictures if fitting[-1] is bare else 0
    notes = tuple(
        f"{count} {what} are left out: the page has reached its limit of {max_mib:g} MiB (--max-mib)."
        for count, what in ((left_out, "records"), (pictures_left_out, "pictures"))
        if count
    )
    rows = dict(head.counts)
    style, script = _file("page.css"), _file("page.js")
    html = rendered(
        "page",
        head=head,
        notes=[*head.notes, *notes],
        counts=[(name, rows.get(name, 0), shown[name], faulty[name]) for name in sorted({*rows, *shown})],
        total=("all", sum(rows.values()), len(kept), faulty.total()),
        flags=[(f"flag:{code}", label, flags[code]) for code, label in (FAULTS | NOTES).items() if flags[code]],
        cards=fitting,
        generator=f"{GENERATOR} {__version__}",
        policy=_policy(style, script),
        style=style,
        script=script,
    )
    return Page(str(html), len(kept), faulty.total(), notes)


def rendered(name: str, **values: Any) -> Markup:
    """A template with values, all of them escaped."""
    return Markup(_UNPRINTABLE.sub("\ufffd", _TEMPLATES.get_template(f"{name}.html.jinja").render(values)))


def search_page(**facts: Any) -> tuple[str, str]:
    """The page of `embedrl serve --page` and its content security policy; `facts`: what its template names."""
    style, script = _file("page.css"), _file("search.js")
    html = rendered("search", style=style, script=script, **facts)
    return str(html), _policy(style, script) + "; connect-src 'self'; frame-ancestors 'none'"


def _file(name: str) -> Markup:
    return Markup((resources.files("embedrl_verl.report") / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _size(html: str) -> int:
    return len(html.encode())


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def encode(image: Image.Image, max_side: int) -> str:
    """An RGB picture as data URI with no side over `max_side` pixels; never enlarged."""
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    form = "png" if small.width * small.height <= MAX_PNG_PIXELS else "jpeg"
    buffer = io.BytesIO()
    small.save(buffer, form, quality=QUALITY, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_at(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in CSS pixels that fits into a frame; small pictures are enlarged, three times at most."""
    scale = min(frame[0] / size[0], frame[1] / size[1], MAX_ENLARGED)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


_TEMPLATES.filters["thousands"] = "{:,}".format
_TEMPLATES.globals |= {"encode": encode, "shown_at": shown_at, "texts": text}
