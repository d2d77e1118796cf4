# SPDX-License-Identifier: Apache-2.0
"""Kept T-CoTs: a question that was answered is not asked again, and no other question gets its answer."""

import json
from pathlib import Path

import pytest

from embedrl_verl.errors import DataError
from embedrl_verl.model import Written, ask_for
from embedrl_verl.model.kept import KeptTcots
from tests.embedder.inputs import picture


class Counting:
    """A Reasoner that counts what it is asked and fails on "bad"."""

    family = "qwen2_vl"

    def __init__(self):
        self.asked = []

    def write(self, asks):
        self.asked += asks
        bad, good = Written(None, problem="it is bad"), ((4, 6),)
        return [bad if ask.item.text == "bad" else Written(f"{len(self.asked)} é {ask.kind}", good) for ask in asks]


def run(folder: Path, inputs, *, asked_by="one", side="query", labels=None, instruction=""):
    """Answers, and how many inputs were asked about."""
    reasoner = Counting()
    kept = KeptTcots(reasoner, folder, asked_by)
    kept.about("a/task", labels or [{"id": str(number)} for number in range(len(inputs))])
    found = kept.write([ask_for(one, side, instruction=instruction) for one in inputs])
    return found, len(reasoner.asked)


def test_the_same_question_is_asked_once(tmp_path):
    inputs = ["x", picture(0), {"text": "x", "image": picture(0)}, "x"]
    first, count = run(tmp_path, inputs)
    assert count == 3 and first[0] == first[3] and first[1].seen_sizes == ((4, 6),)
    assert run(tmp_path, inputs) == (first, 0)
    rows = [json.loads(line) for line in (tmp_path / "a_task.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"] and rows[0]["text"] == first[0].text


@pytest.mark.parametrize(
    "other", [{"asked_by": "two"}, {"side": "target"}, {"instruction": "Find it."}], ids=["reasoner", "side", "prompt"]
)
def test_another_question_is_asked_anew(tmp_path, other):
    run(tmp_path, ["x", picture(0)])
    assert run(tmp_path, ["x", picture(0)], **other)[1] == 2
    assert run(tmp_path, ["y", picture(1)])[1] == 2


def test_a_failure_is_not_kept(tmp_path):
    found, _ = run(tmp_path, ["bad", "good"])
    assert found[0].problem == "it is bad" and found[1].text
    assert run(tmp_path, ["bad", "good"])[1] == 1


def test_half_a_line_of_a_killed_writer_goes_and_other_damage_is_named(tmp_path):
    run(tmp_path, ["x"])
    file = tmp_path / "a_task.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    assert run(tmp_path, ["x"])[1] == 0 and file.read_text() == whole
    file.write_text(whole + '{"id": 1}\n')
    with pytest.raises(DataError, match=r"a_task\.jsonl, line 2: not a kept T-CoT"):
        run(tmp_path, ["x"])
    with pytest.raises(DataError, match="of 2 named inputs were announced"):
        run(tmp_path, ["x"], labels=[{}, {}])
