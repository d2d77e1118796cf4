# SPDX-License-Identifier: Apache-2.0
"""The file of answers keeps what was written whole, whatever a crash or a full disk left behind it."""

import os

import pytest

from embedrl_verl.annotate.answers import Answers, AnswerWriter
from embedrl_verl.errors import DataError, ResourceError

ENTRIES = [
    {"id": name, "question": "query", "try": number, "text": text}
    for name, number, text in (("a", 0, "ein\nZeilenende"), ("b", 0, "日本 \u2028"), ("b", 1, ""), ("c", 0, "x"))
]


def written(path, entries):
    path.touch()
    with AnswerWriter(path) as writer:
        for entry in entries:
            writer.put(entry)


@pytest.fixture
def path(tmp_path):
    written(tmp_path / "answers.jsonl", ENTRIES)
    return tmp_path / "answers.jsonl"


def read(path):
    found = []
    Answers(path, found.append)
    return found


def test_a_file_torn_anywhere_loses_what_is_torn_alone_and_is_written_on(path):
    """Also in the middle of a letter, and with the zeros of a block that was lost."""
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end] + (b"\0" * 512 + b"\n\0") * (end % 2))
        found = read(path)
        assert found == ENTRIES[: whole[:end].count(b"\n")] and path.read_bytes() == whole[: path.stat().st_size]
        written(path, ENTRIES[len(found) :])
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_and_is_left_as_it_is(path):
    damaged = path.read_bytes().replace(b'"b"', b'"b', 1)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="line 2: damaged, and whole lines follow"):
        read(path)
    assert path.read_bytes() == damaged


def test_tries_of_a_question_come_in_order_and_of_no_other(path):
    answers = Answers(path)
    assert answers.tries("b", "query") == tuple(ENTRIES[1:3]) and answers.tries("b", "target") == ()


def test_after_a_full_disk_nothing_more_is_written(path, monkeypatch):
    """What follows may be the try after the one that is lost."""
    whole, write = path.read_bytes(), os.write

    def full(file, data):
        monkeypatch.undo()
        write(file, bytes(data)[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(ResourceError, match="the disk is full.*run the same command again"),
        AnswerWriter(path) as writer,
    ):
        writer.put({"id": "d", "question": "query"})
        writer._thread.join()
        writer.put({"id": "e", "question": "query"})
    assert path.read_bytes() == whole + b'{"id"' and read(path) == ENTRIES
