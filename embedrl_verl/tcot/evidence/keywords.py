# SPDX-License-Identifier: Apache-2.0
"""Keywords of a text: `"text_keywords": ["red bus", "stop"]`, strings, none empty."""

from __future__ import annotations

import re
from collections.abc import Iterator

from embedrl_verl.tcot.evidence.kind import EvidenceKind, InputSize, items_of
from embedrl_verl.tcot.json_objects import JsonObject
from embedrl_verl.tcot.problems import Problems

_SURROGATE = re.compile("[\ud800-\udfff]")


def _read(found: JsonObject, size: InputSize, problems: Problems) -> Iterator[str]:
    for keyword in items_of(found, "text_keywords", problems):
        if isinstance(keyword, str) and keyword.strip() and not _SURROGATE.search(keyword):
            yield keyword
        else:
            problems.add("a text keyword must be a non-empty string of valid Unicode", keyword)


KEYWORDS = EvidenceKind(
    key="text_keywords",
    medium="text",
    ask={
        "paper": 'Point at the evidence in the text: a JSON object with the key "text_keywords", a list of the few '
        "words or short phrases of the text that decide a match, such as "
        '{"text_keywords": ["first phrase", "second phrase"]}.',
        "compact": "text_keywords",
    },
    read=_read,
)
