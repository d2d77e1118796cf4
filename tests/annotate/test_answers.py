# SPDX-License-Identifier: Apache-2.0
"""The file of answers keeps what was written whole, whatever a crash or a full disk left behind it."""

import os
from contextlib import closing

import pytest

from embedrl_verl.annotate.answers import Answers
from embedrl_verl.errors import DataError, ResourceError

ENTRIES = [
    {"id": name, "question": "query", "try": number, "text": text}
    for name, number, text in (("a", 0, "ein\nZeilenende"), ("b", 0, "日本 \u2028"), ("b", 1, ""), ("c", 0, "x"))
]


def write(path, entries):
    """Adds entries; returns those that were there."""
    found = []
    with closing(Answers(path, found.append)) as answers:
        for entry in entries:
            answers.put(entry)
    return found


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "answers.jsonl", ENTRIES)
    return tmp_path / "answers.jsonl"


def test_a_file_torn_anywhere_loses_what_is_torn_alone_and_is_written_on(path):
    """Also in the middle of a letter, and with the zeros of a block that was lost."""
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end] + (b"\0" * 512 + b"\n\0") * (end % 2))
        kept = whole[:end].count(b"\n")
        assert write(path, ENTRIES[kept:]) == ENTRIES[:kept] and path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_and_is_left_as_it_is(path):
    damaged = path.read_bytes().replace(b'"b"', b'"b', 1)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="line 2: damaged, and whole lines follow"):
        Answers(path)
    assert path.read_bytes() == damaged


def test_tries_of_a_question_come_in_order_and_of_no_other(path):
    with closing(Answers(path)) as answers:
        assert answers.tries("b", "query") == tuple(ENTRIES[1:3]) and answers.tries("b", "target") == ()


def test_of_an_answer_that_a_full_disk_cuts_nothing_is_left_before_the_next(path, monkeypatch):
    whole, real = path.read_bytes(), os.write

    def full(file, data):
        monkeypatch.undo()
        real(file, data[:5])
        raise OSError(28, "No space left on device")

    with closing(Answers(path)) as answers:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match="the disk is full.*run the same command again"):
            answers.put(ENTRIES[0])
        assert path.read_bytes() == whole
        answers.put(ENTRIES[0])
    assert write(path, []) == [*ENTRIES, ENTRIES[0]]
