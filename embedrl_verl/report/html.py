# SPDX-License-Identifier: Apache-2.0
"""HTML that is escaped by construction: only `tag` and `join` make `Html`, and every plain string is text to them.

    tag("p", "1 < 2", tag("b", user_text), class_="note")

A record may hold anything, `<script>` included; it can only ever be shown.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
RAW_TEXT = frozenset({"script", "style"})
# Control characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff￾￿]")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element.

    Args:
        name: element name, from the caller's own code.
        children: strings are escaped, `Html` is taken as it is, iterables are flattened, None is nothing.
        attributes: `class_` stands for class and `data_source` for data-source; True is an attribute without a value,
            None and False are left out.

    Raises:
        ValueError: children of an element that has none, or of `script` and `style` (see `raw_element`).
    """
    head = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    if name in RAW_TEXT or (children and name in VOID):
        raise ValueError(f"<{name}> takes no children here")
    return Html(head) if name in VOID else Html(f"{head}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, escaped as `tag` does."""
    return Html("".join(_flat(child) for child in children))


def raw_element(name: str, content: str) -> Html:
    """`script` or `style` with the program's own content.

    Raises:
        ValueError: another element, or content that would end it.
    """
    if name not in RAW_TEXT or "</" in content or "<!--" in content:
        raise ValueError(f"<{name}>: only script and style, and no '</' or '<!--' inside")
    return Html(f"<{name}>{content}</{name}>")


def escape(text: str) -> Html:
    """Text as HTML; what cannot be shown becomes the replacement character."""
    return Html(html.escape(_UNPRINTABLE.sub("�", text), quote=True))


def _flat(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    return escape(child) if isinstance(child, str) else join(child)


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
