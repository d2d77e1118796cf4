# SPDX-License-Identifier: Apache-2.0
"""Every pair goes where its verdict says, RL draws are exact, and nothing depends on files or processes."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert.sampling import preset
from embedrl_verl.curate.split import FATES, SplitSettings
from embedrl_verl.curate.split_job import split_pairs
from embedrl_verl.data.files import REJECTED_FILE
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.errors import ConfigError, DataError

CYCLE = ("match", "mismatch", "match", "mismatch", "unknown")


@pytest.fixture
def records(pair):
    """250 pairs of two sources in turn, so that source a has the even rows."""
    return [pair(f"p{i}", source="ab"[i % 2]) for i in range(250)]


@pytest.fixture
def split(tmp_path, read_all):
    """`split(files, verdicts, "out", rl_rows_each=9)`: the report, and the contrastive and the RL records in `out`."""

    def run(files, verdicts, out="out", workers=1, rows_per_part=100, max_bad_share=0.01, media_root=None, **settings):
        limits = {"workers": workers, "rows_per_part": rows_per_part, "max_bad_share": max_bad_share}
        split = SplitSettings(**settings)
        report = split_pairs(files, verdicts, tmp_path / out, split, media_root=media_root, **limits)
        return report, *(read_all(tmp_path / out / name) for name in ("contrastive", "rl"))

    return run


@pytest.fixture
def judge(tmp_path):
    """`judge(records, verdicts, "name")`: a verdict file; the verdicts are repeated over the records."""

    def write(records, verdicts=CYCLE, name="v"):
        verdict = [verdicts[i % len(verdicts)] for i in range(len(records))]
        pq.write_table(pa.table({"pair_id": ids(records), "verdict": verdict}), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    return write


def ids(records):
    return [record.pair_id for record in records]


def of(records, verdict, source="ab"):
    return [r.pair_id for i, r in enumerate(records) if CYCLE[i % len(CYCLE)] == verdict and r.data_source in source]


def test_matches_train_the_embedder_and_drawn_mismatches_the_reasoner(tmp_path, records, write_parts, judge, split):
    files = write_parts("in", records, [90])
    report, contrastive, rl = split(files, judge(records), rl_rows={"a": 7, "b": 50})
    assert ids(contrastive) == of(records, "match")
    candidates = of(records, "mismatch", "a")
    drawn = [candidates[i * len(candidates) // 7] for i in range(7)] + of(records, "mismatch", "b")
    assert ids(rl) == sorted(drawn, key=ids(records).index)
    by_id = {record.pair_id: record for record in records}
    assert all(by_id[record.pair_id] == record for record in contrastive + rl)
    fates = pq.read_table(tmp_path / "out" / "split.parquet").to_pylist()
    assert [row["pair_id"] for row in fates] == ids(records)
    assert [row["pair_id"] for row in fates if row["fate"] == "rl"] == ids(rl)
    assert {row["fate"] for row in fates if row["verdict"] == "unknown"} == {"left out: verdict unknown"}
    assert report.exit_code == 0
    sources = json.loads((tmp_path / "out" / "split.json").read_text())["sources"]
    source = sources["a"]
    assert (source["pairs"], source["candidates"], source["wanted"]) == (125, 50, 7)
    assert source["verdicts"] == {"match": 50, "mismatch": 50, "unknown": 25}
    assert source["fates"] == {"contrastive": 50, "rl": 7, FATES[3]: 43, FATES[4]: 25}
    assert sum(sum(source["fates"].values()) for source in sources.values()) == 250


@pytest.mark.parametrize("rl_from", ["match", "all"])
def test_both_readings_of_the_paper(records, write_parts, judge, split, rl_from):
    files, verdicts = write_parts("in", records), judge(records)
    _, contrastive, rl = split(files, verdicts, "apart", rl_from=rl_from, rl_rows_each=10)
    assert len(rl) == 20
    assert {*ids(rl)} <= {*of(records, "match")} or rl_from == "all"
    assert ids(contrastive) == [name for name in of(records, "match") if name not in ids(rl)]
    _, contrastive, again = split(files, verdicts, "both", rl_from=rl_from, rl_rows_each=10, keep_rl_matches=True)
    assert again == rl and ids(contrastive) == of(records, "match")


def test_without_verdicts_rl_draws_from_all_and_the_rest_matches(records, write_parts, split):
    files = write_parts("in", records)
    with pytest.raises(ConfigError, match="needs verdicts"):
        split(files, None)
    report, contrastive, rl = split(files, None, rl_from="all", rl_rows_each=25)
    assert (len(contrastive), len(rl)) == (200, 50)
    assert report.values["sources"]["a"]["verdicts"] == {}


def test_unknown_pairs_and_sources_can_be_left_out_or_kept(records, write_parts, judge, split):
    settings = {"unknown": "match", "contrastive_without": ("b", "not in the data"), "rl_rows_each": 0}
    report, contrastive, rl = split(write_parts("in", records), judge(records), **settings)
    assert {*ids(contrastive)} == {*of(records, "match", "a"), *of(records, "unknown", "a")} and rl == []
    assert report.values["sources"]["b"]["fates"] == {FATES[5]: 75, FATES[3]: 50}


@pytest.mark.parametrize("sampling", ["even", "random"])
def test_the_split_depends_neither_on_files_nor_on_processes(tmp_path, records, write_parts, judge, split, sampling):
    files, verdicts, settings = (
        write_parts("in_one", records),
        judge(records),
        {"rl_rows_each": 9, "sampling": sampling},
    )
    one = split(files, verdicts, "one", seed=3, rows_per_part=40, **settings)
    several = write_parts("in_two", records, [1, 100, 30])
    assert split(several, verdicts, "two", seed=3, rows_per_part=40, workers=2, **settings) == one
    parts = [
        sorted(path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob("part*")) for out in ("one", "two")
    ]
    assert parts[0] == parts[1]
    other = split(files, verdicts, "other", seed=4, **settings)
    assert (other[2] == one[2]) == (sampling == "even")  # the seed is of random draws alone


def test_the_preset_is_the_13_sets_and_missing_ones_are_named(pair, write_parts, judge, split):
    wanted = preset("rl_13").caps
    assert len(wanted) == 13 and sum(wanted.values()) == 19_000
    counts = {name: 2 if name == "mmeb_cirr" else 4 for name in [*wanted, "vidore_colpali_pages"] if name != "visrag"}
    records = [pair(f"{source}:{i}", source=source) for source, count in counts.items() for i in range(count)]
    files, verdicts = write_parts("in", records), judge(records, ["mismatch"])
    small = {"rl_preset": "rl_13", "rl_rows": dict.fromkeys(wanted, 3)}
    with pytest.raises(DataError) as error:
        split(files, verdicts, **small)
    for text in (
        "2 of 13 sources",
        "mmeb_cirr: 3 pairs wanted, 2 of them",
        "visrag: 3 pairs wanted, the data have no such source",
        "vidore_colpali_pages (4)",
        "--allow-short",
    ):
        assert text in str(error.value)
    report, _, rl = split(files, verdicts, allow_short=True, **small)
    assert len(rl) == 11 * 3 + 2
    assert report.values["sources"]["vidore_colpali_pages"]["candidates"] == 0  # not named: no RL pairs of it
    assert report.values["sources"]["mmeb_cirr"]["wanted"] == 3


def test_targets_in_both_sets_are_counted_and_can_be_kept_apart(pair, write_parts, judge, split):
    names = ["content-text:" + "0" * 32, "content-media:" + "1" * 32, "own", "answer:yes", "content-media:" + "2" * 32]
    records = [pair(f"{kind}{i}", target_id=name) for kind in ("match", "mismatch") for i, name in enumerate(names[:4])]
    records.append(pair("match4", target_id=names[4]))
    queries = {"match0": "a", "match3": "a", "match4": "b", "mismatch1": "a"}
    records = [replace(record, query_id=queries.get(record.pair_id, "")) for record in records]
    verdicts = judge(records, ["match"] * 4 + ["mismatch"] * 4 + ["match"])
    files, left = write_parts("in", records), {"off": "01234", "media": "034", "all": "4"}
    for disjoint, kept in left.items():
        report, contrastive, rl = split(files, verdicts, disjoint, disjoint_targets=disjoint)
        assert ids(contrastive) == [f"match{number}" for number in kept] and len(rl) == 4
        if disjoint == "off":
            shared = [report.values["shared"][name] for name in ("media", "text", "contents", "queries")]
            assert shared == [2, 2, 4, 2]
            assert "2 contrastive pairs have a query that RL has too" in report.lines
    with pytest.raises(ConfigError, match="keep_rl_matches"):
        SplitSettings(disjoint_targets="all", keep_rl_matches=True)
    bare = write_parts("bare", [pair("p0"), pair("p1")])
    two = judge([pair("p0"), pair("p1")], ["match", "mismatch"], "two")
    with pytest.raises(DataError, match="2 pairs have none; fill them first with embedrl data content-ids"):
        split(bare, two, "bare_out", disjoint_targets="media")
    assert split(bare, two, "bare_out")[0].values["shared"]["without_id"] == 2


def test_verdicts_must_fit_the_data_one_to_one(tmp_path, records, write_parts, pair, judge, split):
    files = write_parts("in", records)
    cases = {
        "missing": (records[2:], r"2 pairs have no verdict: p0, p1\."),
        "extra": ([*records, pair("x1"), pair("x2")], r"2 verdicts have no pair in the data: x1, x2"),
        "double": ([*records, records[4]], r"1 verdicts come twice: p4"),
        "other": ([pair(f"o{i}") for i in range(250)], r"250 pairs have no verdict: p0, .* and 245 more.*250 verdicts"),
    }
    for name, (judged, message) in cases.items():
        with pytest.raises(DataError, match=message):
            split(files, judge(judged, name=name), name)
    with pytest.raises(DataError, match=r"odd\.parquet, row 1: verdict must be one of match, .*got 'maybe'"):
        split(files, judge(records, ["match", "maybe"], "odd"), "odd")
    pq.write_table(pa.table({"pair_id": ["p0"]}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match="column 'verdict' is missing; the file has pair_id"):
        split(files, tmp_path / "half.parquet", "half")
    # another order is no fault
    turned = pq.read_table(judge(records)).take(np.random.default_rng(0).permutation(250))
    pq.write_table(turned, tmp_path / "turned.parquet")
    assert split(files, tmp_path / "turned.parquet", "turned") == split(files, judge(records), "straight")


def test_bad_rows_are_named_and_left_out_wherever_they_are_found(tmp_path, pair, write_parts, judge, split, rejected):
    (file,) = write_parts("in", [pair(f"p{i}") for i in range(8)])
    rows = pq.read_table(file).to_pylist()
    rows[1]["pair_id"] = None
    rows[2]["data_source"] = ""
    rows[4]["pair_id"] = "p3"  # a double
    rows[5]["target"]["text"] = " "  # found when it is written
    rows[6]["query"]["kind"] = "scan"  # found because the judge gave it no verdict
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=3)
    verdicts, out = judge([pair(f"p{i}") for i in (0, 3, 5, 7)], ["match"]), tmp_path / "out"
    report, contrastive, _ = split([file], verdicts, max_bad_share=0.7)
    source = report.values["sources"]["s"]
    assert ids(contrastive) == ["p0", "p3", "p7"] and source["fates"]["contrastive"] == source["pairs"] == 3
    assert (report.exit_code, report.values["rejected"]) == (DataError.exit_code, 5)
    assert rejected(out) == [(1, ""), (2, ""), (4, "pair_id"), (5, ""), (6, "query")]
    assert "row 3 has 'p3' too" in (out / REJECTED_FILE).read_text()
    fates = pq.read_table(out / "split.parquet")["fate"].to_pylist()
    assert [place for place, fate in enumerate(fates) if fate == "rejected"] == [1, 2, 4, 5, 6]
    with pytest.raises(DataError, match=r"of 8 rows cannot be used, over the limit of 10.00%"):
        split([file], verdicts, "strict", max_bad_share=0.1)
