# SPDX-License-Identifier: Apache-2.0
"""Two results are compared query by query, by id, and only if all that is stamped is equal."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl import cli
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.paired import compare, paired, paired_gains, read_results

STAMP = {"data": "d", "queries": "20 of 20", "frame_rule": "8"}


def benchmark(folder: Path, tasks: dict[str, dict[str, list[float]]], ids: list[str], **stamp: str) -> str:
    for name, cells in tasks.items():
        rows = [
            {"cell": cell, "query": query, "hit@1": value}
            for cell, values in cells.items()
            for query, value in zip(ids, values, strict=True)
        ]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        (folder / f"{name}.json").write_text(json.dumps({"metric": "hit@1", "stamp": STAMP | stamp, "cells": {}}))
    return str(folder)


IDS = [f"q{i}" for i in range(20)]
LOW, HIGH = [0.0, 1.0] * 10, [1.0, 1.0, 0.0, 1.0] * 5


def test_queries_are_paired_by_id_in_whatever_order_and_tasks_weigh_the_same(tmp_path: Path) -> None:
    ours = benchmark(tmp_path / "a", {"x/one": {"plain": HIGH}, "two": {"plain": LOW}, "mine": {"plain": LOW}}, IDS)
    theirs = benchmark(tmp_path / "b", {"x/one": {"plain": LOW[::-1]}, "two": {"plain": LOW[::-1]}}, IDS[::-1])
    pairs = paired_gains(read_results(Path(ours)), read_results(Path(theirs)), "both")
    assert set(pairs) == {("x/one", "plain"), ("two", "plain")}
    gain = paired([pairs["x/one", "plain"]])
    assert (gain.queries, gain.ours, gain.theirs, gain.gain.mean) == (20, 0.75, 0.5, 0.25)
    assert gain.gain.low > 0, "no query is lost: unpaired intervals of 20 queries would overlap"
    lines = compare(ours, theirs)
    assert lines[1].split()[:5] == ["two", "plain", "20", "50.00", "50.00"] and lines[1].endswith("unclear")
    assert "+25.00 [+" in lines[2] and lines[2].endswith("better")
    assert lines[3].startswith("mean of 2") and "+12.50 [" in lines[3]
    assert lines[4] == "only in one of the two: mine"


def test_two_cells_of_one_run_are_compared_and_few_queries_have_no_verdict(tmp_path: Path) -> None:
    ours = benchmark(tmp_path / "a", {"one": {"plain": [0.0] * 9, "tcot": [1.0] * 9}}, IDS[:9])
    (line,) = compare(ours, ours, cell="tcot", base="plain")[1:]
    assert line.split() == ["one", "tcot", "-", "plain", "9", "100.00", "0.00", "+100.00", "too", "few", "queries"]


def test_other_stamps_queries_and_folders_are_refused_and_named(tmp_path: Path) -> None:
    ours = benchmark(tmp_path / "a", {"one": {"plain": LOW}}, IDS)
    other = benchmark(tmp_path / "b", {"one": {"plain": LOW}}, IDS, frame_rule="4")
    with pytest.raises(ConfigError, match=r"the results of one in .* equal stamps .*; frame_rule is '8' and '4'"):
        compare(ours, other)
    other = benchmark(tmp_path / "c", {"one": {"plain": LOW}}, [*IDS[:19], "else"])
    with pytest.raises(DataError, match="same queries .* only one has else"):
        compare(ours, other)
    elsewhere = benchmark(tmp_path / "d", {"two": {"plain": LOW}}, IDS)
    with pytest.raises(ConfigError, match=r"must share a task and a cell; there are one and plain"):
        compare(ours, elsewhere)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it has no results"):
        compare(ours, str(tmp_path / "empty"))


def test_a_cell_that_a_folder_lacks_is_named_with_the_option_and_the_cells_there(tmp_path: Path) -> None:
    ours = benchmark(tmp_path / "a", {"one": {"plain": LOW, "tcot": HIGH}}, IDS)
    theirs = benchmark(tmp_path / "b", {"one": {"plain": LOW}}, IDS)
    with pytest.raises(ConfigError, match=r"^--cell must be a cell of \S+/a: plain, tcot; got 'x'"):
        compare(ours, theirs, cell="x", base="y")
    with pytest.raises(ConfigError, match=r"^--base must be a cell of \S+/b: plain; got 'raw'"):
        compare(ours, theirs, cell="tcot", base="raw")
    with pytest.raises(ConfigError, match=r"^--cell \(--base names another .*\) must be a cell of \S+/b: plain; got"):
        compare(ours, theirs, cell="tcot")


def test_all_cells_in_common_are_compared_and_the_others_are_said_to_be_left_out(tmp_path: Path) -> None:
    cells = {"plain": LOW, "tcot": HIGH}
    ours = benchmark(tmp_path / "a", {"one": cells | {"mine": LOW}, "two": cells}, IDS)
    theirs = benchmark(tmp_path / "b", {"one": cells, "two": {"plain": LOW}}, IDS)
    lines = compare(ours, theirs)
    assert [line.split()[:2] for line in lines[1:4]] == [["one", "plain"], ["one", "tcot"], ["two", "plain"]]
    left = "cell not compared, one of the two lacks it: "
    assert lines[-2:] == [f"{left}mine of one", f"{left}tcot of two"]
    assert compare(ours, theirs, cell="tcot")[-1] == f"{left}tcot of two"
    assert not compare(ours, theirs, cell="tcot", base="plain")[-1].startswith(left)


def evaluation(folder: Path, hits: list[int], **stamp: str) -> str:
    folder.mkdir()
    views = {"raw": {"hits": {"s": [0] * 12}}, "after": {"hits": {"s": hits}}}
    result = {"stamp": {"pairs": "p"} | stamp, "query_ids": {"s": IDS[:12]}, "views": views}
    (folder / "evaluation.json").write_text(json.dumps(result))
    return str(folder)


def test_evaluations_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = evaluation(tmp_path / "a", [1] * 12), evaluation(tmp_path / "b", [0] * 6 + [1] * 6)
    assert cli.main(["compare", one, other]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["s", "raw"] and "+0.00" in printed[1]
    assert printed[2].split()[:2] == ["s", "after"] and "+50.00 [+" in printed[2] and printed[2].endswith("better")
    third = evaluation(tmp_path / "c", [1] * 12, pairs="others")
    assert cli.main(["compare", one, third]) == 2
    assert "pairs is 'p' and 'others'" in capsys.readouterr().err
    (tmp_path / "c" / "evaluation.json").write_text('{"views": {}}')
    assert cli.main(["compare", one, third]) == 2
    assert "of an older version, without a stamp" in capsys.readouterr().err


def test_other_files_beside_results_are_no_results(tmp_path: Path) -> None:
    ours = benchmark(tmp_path, {"scores/one": {"plain": LOW}}, IDS)
    pq.write_table(pa.table({"pair_id": ["p"]}), tmp_path / "gate.parquet")
    (tmp_path / "gate.json").write_text('{"threshold": 0.1}')
    assert list(read_results(Path(ours))) == ["scores/one"]
