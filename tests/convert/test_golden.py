# SPDX-License-Identifier: Apache-2.0
"""Each converter makes of its fixture the records that the golden files hold."""

from __future__ import annotations

import json
import os

import pytest

from tests.convert.golden import FOLDER, PAIRS, conversions, readable
from tests.convert.make_fixtures import write_all

NAMES = (
    "mmeb_original",
    "mmeb_diverse_instruction",
    "llava_hound",
    "llava_hound_embed_rl",
    "colpali_answer",
    "colpali_page",
    "visrag",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("fixtures"), pairs=PAIRS)


@pytest.mark.parametrize("name", NAMES)
def test_the_records_are_the_golden_ones(name, roots):
    converter, root = conversions(roots)[name]
    found = readable(converter, root)
    file = FOLDER / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(file.read_text(encoding="utf-8"))


def test_every_conversion_has_a_golden_file(roots):
    assert set(conversions(roots)) == set(NAMES)
