# SPDX-License-Identifier: Apache-2.0
"""Each converter makes of its fixture the records that the golden files hold."""

from __future__ import annotations

import json
import os

import pytest

from tests.convert.golden import CONVERSIONS, FOLDER, readable


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_records_are_the_golden_ones(name, roots):
    converter, fixture = CONVERSIONS[name]
    found = readable(converter, roots[fixture])
    file = FOLDER / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(file.read_text(encoding="utf-8"))
