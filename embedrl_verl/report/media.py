# SPDX-License-Identifier: Apache-2.0
"""The media of a side: pictures with their boxes drawn, the film strip with its key frames, the pieces of evidence.

Boxes are drawn as SVG over the picture in the pixels of the original, so that they are exact however far the picture is
scaled down.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from embedrl_verl.data.media import LoadedItem
from embedrl_verl.report.html import Html, join, tag
from embedrl_verl.report.pictures import PictureBook, shown_at
from embedrl_verl.report.text import colour_class
from embedrl_verl.report.views import BoxView, PieceView, SideView

PICTURE = (560, 460)
FRAME = (148, 148)
PIECE = (180, 132)
"""Frames (width, height in CSS pixels) into which pictures are fitted."""
SHARPNESS = 2
"""Pixels in the file for each CSS pixel of a small picture, for screens of high resolution."""
MAX_PICTURES = 12
LABEL_PX = 13
NOT_EMBEDDED = "left out to keep the page within its size limit (--max-mib)"


def pictures(item: LoadedItem, boxes: Sequence[BoxView], book: PictureBook) -> Html | None:
    """The images of an item, each with its boxes."""
    if not item.images:
        return None
    noun = "Page" if item.kind == "page" else "Image"
    figures = [
        _figure(image, f"{noun} {number}", [box for box in boxes if box.image == number], book)
        for number, image in enumerate(item.images[:MAX_PICTURES], 1)
    ]
    more = len(item.images) - MAX_PICTURES
    rest = tag("p", f"… and {more} more", class_="empty") if more > 0 else None
    return tag("div", figures, rest, class_="pictures")


def film_strip(side: SideView, book: PictureBook) -> Html | None:
    """The frames of a clip, numbered from 1; key frames are outlined and say so."""
    item = side.item
    if item is None or not item.frames:
        return None
    names: dict[int, list[str]] = {}
    for view in side.tcots:
        for frame in view.tcot.key_frames:
            if view.prefix not in names.setdefault(frame, []):
                names[frame].append(view.prefix)
    frames = []
    for number, image in enumerate(item.frames, 1):
        is_key = number in names
        told = f"{number}" + (f" · key{''.join(f' {name}' for name in names[number] if name)}" if is_key else "")
        second = "" if item.times is None else f" {item.times.seconds[number - 1]:.1f} s"
        alt = f"Frame {number} of {len(item.frames)}{', a key frame' if is_key else ''}"
        caption = tag("figcaption", tag("b", told), tag("span", second))
        picture = tag("figure", _image(image, alt, FRAME, book, SHARPNESS * max(FRAME)), caption)
        frames.append(tag("li", picture, class_="key" if is_key else None))
    return tag("ol", frames, class_="film")


def piece_list(pieces: Sequence[PieceView], book: PictureBook) -> Html | None:
    """Pieces of evidence at their own resolution, and the size at which the Embedder reads them."""
    if not pieces:
        return None
    items = []
    for piece in pieces:
        width, height = piece.image.size
        size = f"{width}×{height} px, read at {piece.read_at[0]}×{piece.read_at[1]}"
        name = tag(
            "span", piece.name, class_="dot key" if piece.colour is None else f"dot {colour_class(piece.colour)}"
        )
        picture = _image(piece.image, f"Evidence {piece.name}, {size}", PIECE, book, SHARPNESS * max(PIECE))
        items.append(tag("li", tag("figure", picture, tag("figcaption", name, " ", size))))
    return join([tag("p", "What the Embedder gets of it", class_="label"), tag("ul", items, class_="pieces")])


def _figure(image: Image.Image, name: str, boxes: Sequence[BoxView], book: PictureBook) -> Html:
    width, height = image.size
    drawn = [box for box in boxes if box.pixels is not None]
    named = f" with box{'es' if len(drawn) > 1 else ''} {', '.join(box.name for box in drawn)}" if drawn else ""
    picture = _image(image, f"{name}{named}", PICTURE, book, None)
    overlay = _overlay(image.size, drawn) if drawn else None
    caption = f"{name} · {width}×{height} px"
    return tag("figure", tag("div", picture, overlay, class_="canvas"), tag("figcaption", caption))


def _image(image: Image.Image, alt: str, frame: tuple[int, int], book: PictureBook, max_side: int | None) -> Html:
    width, height = shown_at(image.size, *frame)
    uri = book.data_uri(image, max_side)
    if uri is None:
        return tag("span", f"{alt}: {NOT_EMBEDDED}", class_="absent-picture")
    enlarged = width >= 2 * image.width
    return tag(
        "img",
        src=uri,
        alt=alt,
        width=width,
        height=height,
        class_="enlarged" if enlarged else None,
    )


def _overlay(size: tuple[int, int], boxes: Sequence[BoxView]) -> Html:
    """Boxes over a picture of `size` pixels; those that are not cut are dashed."""
    width, height = size
    unit = width / shown_at(size, *PICTURE)[0]  # pixels of the original under one CSS pixel
    return tag(
        "svg",
        (_drawn_box(box, unit, size) for box in boxes),
        viewBox=f"0 0 {width} {height}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _drawn_box(box: BoxView, unit: float, size: tuple[int, int]) -> Html:
    assert box.pixels is not None
    x1, y1, x2, y2 = box.pixels
    shape: dict[str, int] = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    text = f"{box.name} {box.label}".strip()[:24]
    label_width, label_height = (0.62 * LABEL_PX * len(text) + 8) * unit, (LABEL_PX + 5) * unit
    top = y1 - label_height if y1 >= label_height else min(y1, size[1] - label_height)
    left = max(0.0, min(float(x1), size[0] - label_width))
    return tag(
        "g",
        tag("title", f"{text}: {x1},{y1} to {x2},{y2} px" + (f", left out: {box.status}" if box.status else "")),
        tag("rect", class_="halo", **shape),
        tag("rect", class_="line", **shape),
        tag("rect", class_="tab", x=left, y=top, width=label_width, height=label_height, rx=2 * unit),
        tag("text", text, x=left + 4 * unit, y=top + LABEL_PX * unit, font_size=LABEL_PX * unit),
        class_=f"box {colour_class(box.colour)}{' out' if box.status else ''}",
    )
