# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md is made of the YAML comments, and every key of ours has one."""

from importlib.resources import files
from pathlib import Path

import pytest

from embedrl_verl.config import docs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_committed_document_is_the_generated_one():
    assert PAGE.read_text() == docs.document(PAGE.read_text()), "run: python -m " + docs.MARKER.split("-m ")[1][:-4]


@pytest.mark.parametrize(
    ("name", "ours"),
    [("egrl_trainer.yaml", ("embedrl.", "data.embedrl.")), ("embedder_trainer.yaml", ("",))],
)
def test_every_key_of_ours_has_a_meaning(name, ours):
    keys = docs.keys_of(files("embedrl_verl.config").joinpath(name).read_text())
    assert len(keys) > 40
    assert not [key.path for key in keys if key.path.startswith(ours) and not key.comment]


def test_a_comment_belongs_to_the_key_below_it_and_to_no_other():
    text = "# The file.\n\na:\n\n  # One,\n  # two.\n  b: 1\n\n  c: [x, y]\n\n# After.\n\nd:\n  e: null\n"
    assert docs.keys_of(text) == [
        docs.Key("a", "", ""),
        docs.Key("a.b", "1", "One, two."),
        docs.Key("a.c", "[x, y]", ""),
        docs.Key("d", "", ""),
        docs.Key("d.e", "null", ""),
    ]
