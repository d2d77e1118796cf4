# SPDX-License-Identifier: Apache-2.0
"""A journal keeps what was written whole, whatever a crash left behind it."""

import json
import os

import pytest

from embedrl_verl.annotate.journal import Journal, JournalError, read_journal, summary_of
from embedrl_verl.errors import DataError

HEADER = {"settings": "s", "chunk": 1}
ENTRIES = [{"id": "a", "text": "ein\nZeilenende"}, {"id": "b", "text": "日本 \u2028"}, {"id": "c", "text": ""}]


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "j", HEADER)
    journal.append(ENTRIES)
    journal.close()
    return tmp_path / "j"


def reopened(path):
    journal = Journal(path, HEADER)
    journal.close()
    return journal.entries


def test_a_torn_tail_of_any_length_costs_the_last_entry_alone(path):
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert reopened(path) == ENTRIES[:2]
        assert path.read_bytes() == whole[:last]


def test_a_journal_torn_anywhere_can_be_written_on(path):
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        journal = Journal(path, HEADER)
        assert ENTRIES[: len(journal.entries)] == journal.entries
        journal.append(ENTRIES[len(journal.entries) :])
        journal.close({"n": 3})
        assert read_journal(path) == ENTRIES and summary_of(path, HEADER) == {"n": 3}


def test_zeros_at_the_end_of_a_lost_block_are_cut_off(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 512 + b"\n" + b"\0" * 100)
    assert reopened(path) == ENTRIES and path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_and_is_left_as_it_is(path):
    damaged = path.read_bytes().replace(b'"b"', b'"b')
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="line 3: damaged, and whole lines follow"):
        Journal(path, HEADER)
    assert path.read_bytes() == damaged


def test_a_journal_of_other_settings_is_refused(path):
    with pytest.raises(DataError, match="of other work"):
        Journal(path, {**HEADER, "settings": "t"})
    with pytest.raises(DataError, match="of other work"):
        summary_of(path, {**HEADER, "settings": "t"})


def test_an_unfinished_journal_has_no_summary_and_cannot_be_read(path):
    assert summary_of(path, HEADER) is None and summary_of(path.with_name("none"), HEADER) is None
    with pytest.raises(DataError, match="not complete"):
        read_journal(path)


def test_a_closed_journal_takes_nothing_more(path):
    journal = Journal(path, HEADER)
    journal.close({})
    with pytest.raises(DataError, match="closed"):
        Journal(path, HEADER)


def test_a_full_disk_leaves_no_torn_line_for_others_to_follow(path, monkeypatch):
    whole = path.read_bytes()
    journal = Journal(path, HEADER)
    write = os.pwrite

    def full(file, data, place):
        write(file, bytes(data)[:5], place)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="No space left on device"):
        journal.append([{"id": "d"}])
    assert path.read_bytes() == whole
    monkeypatch.undo()
    with pytest.raises(JournalError, match="No space left on device"):  # "e" may be the try after the lost "d"
        journal.append([{"id": "e"}])
    journal.close()
    assert path.read_bytes() == whole and reopened(path) == ENTRIES


def test_a_journal_that_lost_entries_is_never_called_complete(path, monkeypatch):
    """The closing line is short, and may fit where the entries did not."""
    journal = Journal(path, HEADER)

    def full(file, data, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="No space"):
        journal.append([{"id": "d"}])
    monkeypatch.undo()
    with pytest.raises(JournalError, match="not complete, since entries could not be written"):
        journal.close({"n": 4})
    journal.close()
    journal.close()  # once more does no harm
    assert summary_of(path, HEADER) is None and reopened(path) == ENTRIES


def test_entries_are_one_line_of_json_each(path):
    lines = path.read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [HEADER, *ENTRIES] and lines[-1] == ""
