# SPDX-License-Identifier: Apache-2.0
"""A data set folder: only what is missing is made, by the same build, one process at a time."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager

import pytest

from embedrl_verl.data import build
from embedrl_verl.data.files import begin_work, pair_files
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError, ResourceError

FACTS = {"tool": "t", "command": "c", "settings": {"n": 1}, "input": []}


class Maker:
    """Makes a part of one record by task; a task "bad" gives a rejected row, "stop" an error."""

    def __init__(self):
        self.made = []

    def __call__(self, task, part):
        if task == "stop":
            raise ResourceError("stopped")
        self.made.append(task)
        records = [] if task == "bad" else [PairRecord(task, "s", "", Item(text="q"), Item(text="t"))]
        write_pairs(records, part)
        rejected = [{"file": "f", "row": len(self.made), "field": "x", "reason": "is 7"}] if task == "bad" else []
        return {"records": len(records), "by_source": {"s": len(records)}, "rejected": rejected}


@contextmanager
def parts_of(out, maker, tasks, share=0.5, facts=FACTS):
    with build.building(out, facts, ["again"]) as work:
        limits = {"rows": len(tasks), "workers": 1, "max_bad_share": share, "label": "test"}
        yield work and build.make_parts(maker, tasks, work, **limits)


def make(out, maker, tasks, **options):
    with parts_of(out, maker, tasks, **options) as reports:
        return reports and build.finish(out, "name", FACTS, reports, media_root=None)


def test_after_a_stop_only_parts_without_a_report_are_made_and_a_finished_folder_is_not_made_again(tmp_path):
    maker = Maker()
    with pytest.raises(ResourceError, match="stopped"):
        make(tmp_path, maker, ["a", "b", "stop"])
    (tmp_path / "_work" / "part-00001.parquet.json").unlink()  # killed between the part and its report
    card = make(tmp_path, maker, ["a", "b", "c"])
    assert maker.made == ["a", "b", "b", "c"]
    assert [record.pair_id for file in pair_files([tmp_path]) for record in read_pairs(file)] == ["a", "b", "c"]
    assert json.loads((tmp_path / "data_card.json").read_text()) == card
    assert make(tmp_path, maker, ["a", "b", "c"]) is None
    assert len(maker.made) == 4


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_facts_are_refused_by_name_and_change_nothing(tmp_path, is_finished):
    if is_finished:
        make(tmp_path, Maker(), ["a"])
    else:
        with pytest.raises(ResourceError):
            make(tmp_path, Maker(), ["stop"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"with other options or input: settings\.n was 1, is 2"):
        make(tmp_path, Maker(), ["a"], facts={**FACTS, "settings": {"n": 2}})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_part_that_another_node_has_written_elsewhere_is_an_error(tmp_path):
    def run(function, make, jobs, workers):
        yield from ((number, {"records": 1}) for number, *_ in jobs)

    with (
        build.building(tmp_path, FACTS, ["again"]) as work,
        pytest.raises(ResourceError, match=r"part-00000\.parquet was written and is not here"),
    ):
        build.make_parts(Maker(), ["a"], work, rows=1, workers=2, max_bad_share=0, label="test", run=run)


def test_two_writers_are_refused(tmp_path):
    with (
        build.building(tmp_path, FACTS, ["first"]),
        pytest.raises(ConfigError, match="another process is writing"),
        build.building(tmp_path, FACTS, ["second"]),
    ):
        pass


def test_a_writer_that_ends_before_our_lock_leaves_its_finished_folder(tmp_path, monkeypatch):
    make(tmp_path, Maker(), ["a"])
    begin_work(tmp_path, ["first"])  # as it stands when we look
    (tmp_path / "_work" / "build.json").write_text("{}")

    @contextmanager
    def late(folder):
        (tmp_path / "_work" / "build.json").unlink()
        yield

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another process has just finished"):
        patch.setattr(build, "only_writer", late)
        make(tmp_path, Maker(), ["b"], facts={**FACTS, "settings": {}})
    assert make(tmp_path, Maker(), ["a"]) is None


def test_files_of_a_killed_writer_go_and_those_of_a_person_stay(tmp_path):
    for name in (".notes.tmp", ".part-00000.parquet.123.tmp"):
        (tmp_path / name).touch()
    make(tmp_path, Maker(), ["a"])
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"]


def test_too_many_bad_rows_stop_with_causes_and_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used, over the limit of 50\.00%:\n  2 x x: is … "):
        make(tmp_path, Maker(), ["bad", "a", "bad"])
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2
    assert make(tmp_path, Maker(), ["bad", "a", "bad"], share=0.7)["rejected"]["rows"] == 2


def test_a_full_disk_is_a_resource_error_and_the_same_command_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in (("data.build", "write_json"), ("data.files", "write_atomically")):
        with monkeypatch.context() as patch, pytest.raises(ResourceError, match="the disk is full; what is finished"):
            patch.setattr(f"embedrl_verl.{module}.{name}", full)
            make(tmp_path, Maker(), ["a"])
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="the disk is full; what is finished is ke"):
        patch.setattr("embedrl_verl.data.files.write_atomically", full)
        begin_work(tmp_path / "other", ["command"])
    assert make(tmp_path, Maker(), ["a"])["records"] == 1
