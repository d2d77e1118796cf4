# SPDX-License-Identifier: Apache-2.0
"""Every pair goes where its verdict says, RL draws are exact, and nothing depends on files or processes."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.cli import main
from embedrl_verl.convert.sampling import preset
from embedrl_verl.curate.split import FATES, SplitSettings
from embedrl_verl.data.files import read_object
from embedrl_verl.errors import ConfigError, DataError
from tests.curate.conftest import pair, read_all, rejected, split, spoil, write_parts

CYCLE = ("match", "mismatch", "match", "mismatch", "unknown")
RECORDS = [pair(f"p{i}", source="ab"[i % 2]) for i in range(250)]
"""Of two sources in turn, so that source a has the even rows."""


def judge(records=RECORDS, verdicts=CYCLE, name="v"):
    """A verdict file; the verdicts are repeated over the records."""
    verdict = [verdicts[i % len(verdicts)] for i in range(len(records))]
    pq.write_table(pa.table({"pair_id": ids(records), "verdict": verdict}), f"{name}.parquet")
    return f"{name}.parquet"


def ids(records):
    return [record.pair_id for record in records]


def of(verdict, source="ab"):
    return [r.pair_id for i, r in enumerate(RECORDS) if CYCLE[i % len(CYCLE)] == verdict and r.data_source in source]


def test_matches_train_the_embedder_and_drawn_mismatches_the_reasoner():
    report, contrastive, rl = split(write_parts("in", RECORDS, [90]), judge(), rl_rows={"a": 7, "b": 50})
    assert ids(contrastive) == of("match")
    candidates = of("mismatch", "a")
    drawn = [candidates[i * len(candidates) // 7] for i in range(7)] + of("mismatch", "b")
    assert ids(rl) == sorted(drawn, key=ids(RECORDS).index)
    by_id = {record.pair_id: record for record in RECORDS}
    assert all(by_id[record.pair_id] == record for record in contrastive + rl)
    fates = pq.read_table("out/split.parquet").to_pylist()
    assert ids(RECORDS) == [row["pair_id"] for row in fates]
    assert [row["pair_id"] for row in fates if row["fate"] == "rl"] == ids(rl)
    assert {row["fate"] for row in fates if row["verdict"] == "unknown"} == {"left out: verdict unknown"}
    sources = read_object(Path("out/split.json"))["sources"]
    counts = {"pairs": 125, "candidates": 50, "wanted": 7, "verdicts": {"match": 50, "mismatch": 50, "unknown": 25}}
    assert sources["a"] == {**counts, "fates": {"contrastive": 50, "rl": 7, FATES[3]: 43, FATES[4]: 25}}
    assert sum(sum(source["fates"].values()) for source in sources.values()) == 250 and report.exit_code == 0
    assert report.lines[1].split() == ["a", "125", "50", "50", "25", "50", "7", "50", "68"]


@pytest.mark.parametrize("rl_from", ["match", "all"])
def test_both_readings_of_the_paper(rl_from):
    files, verdicts = write_parts("in", RECORDS), judge()
    _, contrastive, rl = split(files, verdicts, "apart", rl_from=rl_from, rl_rows_each=10)
    assert len(rl) == 20 and ({*ids(rl)} <= {*of("match")}) == (rl_from == "match")
    assert ids(contrastive) == [name for name in of("match") if name not in ids(rl)]
    _, contrastive, again = split(files, verdicts, "both", rl_from=rl_from, rl_rows_each=10, keep_rl_matches=True)
    assert again == rl and ids(contrastive) == of("match")


def test_without_verdicts_rl_draws_from_all_and_the_rest_matches():
    files = write_parts("in", RECORDS)
    with pytest.raises(ConfigError, match="needs verdicts"):
        split(files, None)
    report, contrastive, rl = split(files, None, rl_from="all", rl_rows_each=25)
    assert (len(contrastive), len(rl), report.values["sources"]["a"]["verdicts"]) == (200, 50, {})


def test_unknown_pairs_and_sources_can_be_left_out_or_kept():
    settings = {"unknown": "match", "contrastive_without": ("b", "not in the data"), "rl_rows_each": 0}
    report, contrastive, rl = split(write_parts("in", RECORDS), judge(), **settings)
    assert {*ids(contrastive)} == {*of("match", "a"), *of("unknown", "a")} and rl == []
    assert report.values["sources"]["b"]["fates"] == {FATES[5]: 75, FATES[3]: 50}
    assert "NOTE no pair is left for RL: rl/ is empty; see --rl-from" in report.lines


@pytest.mark.parametrize("sampling", ["even", "random"])
def test_the_split_depends_neither_on_files_nor_on_processes(sampling):
    whole, pieces, verdicts = write_parts("in_one", RECORDS), write_parts("in_two", RECORDS, [1, 100, 30]), judge()
    settings = {"rl_rows_each": 9, "sampling": sampling, "rows_per_part": 40}
    one = split(whole, verdicts, "one", seed=3, **settings)
    assert split(pieces, verdicts, "two", seed=3, workers=2, **settings) == one
    parts = [sorted(path.relative_to(out) for path in Path(out).rglob("part*")) for out in ("one", "two")]
    assert parts[0] == parts[1]
    other = split(whole, verdicts, "other", seed=4, **settings)
    assert (other[2] == one[2]) == (sampling == "even")  # the seed is of random draws alone


def test_sources_of_the_preset_that_are_missing_or_short_are_named():
    wanted = preset("rl_13").caps
    counts = {name: 2 if name == "mmeb_cirr" else 4 for name in [*wanted, "vidore_colpali_pages"] if name != "visrag"}
    records = [pair(f"{source}:{i}", source=source) for source, count in counts.items() for i in range(count)]
    files, verdicts = write_parts("in", records), judge(records, ["mismatch"])
    small = {"rl_preset": "rl_13", "rl_rows": dict.fromkeys(wanted, 3)}
    with pytest.raises(DataError) as error:
        split(files, verdicts, **small)
    for text in ("2 of 13 sources", "mmeb_cirr: 3 pairs wanted, 2 of them", "visrag: 3 pairs wanted, the data have no"):
        assert text in str(error.value)
    assert "vidore_colpali_pages (4)" in str(error.value) and "--allow-short" in str(error.value)
    report, _, rl = split(files, verdicts, allow_short=True, **small)
    assert len(rl) == 11 * 3 + 2
    assert report.values["sources"]["vidore_colpali_pages"]["candidates"] == 0  # not named: no RL pairs of it
    assert report.values["sources"]["mmeb_cirr"]["wanted"] == 3


def test_targets_in_both_sets_are_counted_and_can_be_kept_apart():
    names = ["content-text:" + "0" * 32, "content-media:" + "1" * 32, "own", "answer:yes", "content-media:" + "2" * 32]
    records = [pair(f"{kind}{i}", target_id=name) for kind in ("match", "mismatch") for i, name in enumerate(names)][:9]
    queries = {"match0": "a", "match3": "a", "match4": "b", "mismatch1": "a"}
    records = [replace(record, query_id=queries.get(record.pair_id, "")) for record in records]
    files, verdicts = write_parts("in", records), judge(records, ["match"] * 5 + ["mismatch"] * 4)
    for disjoint, kept in {"off": "01234", "media": "034", "all": "4"}.items():
        report, contrastive, rl = split(files, verdicts, disjoint, disjoint_targets=disjoint)
        assert ids(contrastive) == [f"match{number}" for number in kept] and len(rl) == 4
        if disjoint == "off":
            shared = {"media": 2, "text": 2, "contents": 4, "queries": 2, "without_id": 0}
            assert report.values["shared"] == shared
            assert "2 contrastive pairs have a query that RL has too" in report.lines
    with pytest.raises(ConfigError, match="keep_rl_matches"):
        SplitSettings(disjoint_targets="all", keep_rl_matches=True)
    bare = [pair("p0"), pair("p1")]
    files, verdicts = write_parts("bare", bare), judge(bare, ["match", "mismatch"])
    with pytest.raises(DataError, match="2 pairs have none; fill them first with embedrl data content-ids"):
        split(files, verdicts, "bare_out", disjoint_targets="media")
    assert split(files, verdicts, "bare_out")[0].values["shared"]["without_id"] == 2


def test_verdicts_must_fit_the_data_one_to_one():
    files, strangers = write_parts("in", RECORDS), [pair(f"o{i}") for i in range(250)]
    pq.write_table(pa.table({"pair_id": ["p0"]}), "half.parquet")
    cases = {
        judge(RECORDS[2:], name="missing"): r"2 pairs have no verdict: p0, p1\.",
        judge([*RECORDS, *strangers[:2]], name="extra"): r"2 verdicts have no pair in the data: o0, o1",
        judge([*RECORDS, RECORDS[4]], name="double"): r"1 verdicts come twice: p4",
        judge(strangers, name="other"): r"250 pairs have no verdict: p0, .* and 245 more.*250 verdicts",
        judge(verdicts=["match", "maybe"], name="odd"): r"odd\.parquet, row 1: verdict must be .*got 'maybe'",
        "half.parquet": "column 'verdict' is missing; the file has pair_id",
    }
    for file, message in cases.items():
        with pytest.raises(DataError, match=message):
            split(files, file)
    # another order is no fault
    pq.write_table(pq.read_table(judge()).take(np.random.default_rng(0).permutation(250)), "turned.parquet")
    assert split(files, "turned.parquet", "turned") == split(files, judge(), "straight")


def test_bad_rows_are_named_and_left_out_wherever_they_are_found():
    def change(rows):
        rows[1]["pair_id"] = None
        rows[2]["data_source"] = ""
        rows[4]["pair_id"] = "p3"  # a double
        rows[5]["target"]["text"] = " "  # found when it is written
        rows[6]["query"]["kind"] = "scan"  # found because the judge gave it no verdict

    (file,) = write_parts("in", [pair(f"p{i}") for i in range(8)])
    spoil(file, change)
    verdicts = judge([pair(f"p{i}") for i in (0, 3, 5, 7)], ["match"])
    report, contrastive, _ = split([file], verdicts, max_bad_share=0.7)
    source = report.values["sources"]["s"]
    assert ids(contrastive) == ["p0", "p3", "p7"] and source["fates"]["contrastive"] == source["pairs"] == 3
    assert (report.exit_code, report.values["rejected"]) == (DataError.exit_code, 5)
    places = [(1, ""), (2, ""), (4, "pair_id"), (5, ""), (6, "query")]
    assert [(line["row"], line["field"]) for line in rejected("out")] == places
    assert "row 3 has 'p3' too" in rejected("out")[2]["reason"]
    fates = pq.read_table("out/split.parquet")["fate"].to_pylist()
    assert [place for place, fate in enumerate(fates) if fate == "rejected"] == [1, 2, 4, 5, 6]
    with pytest.raises(DataError, match=r"of 8 rows cannot be used, over the limit of 10.00%"):
        split([file], verdicts, "strict", max_bad_share=0.1)


def test_what_is_held_out_shares_no_content_with_what_trains(capsys):
    choose = random.Random(0)
    own = [{side: f"{side}{choose.randrange(400)}" for side in ("query_id", "target_id")} for _ in range(300)]
    records = [pair(f"p{i}", source="ab"[i % 2], **given) for i, given in enumerate(own)]
    whole, pieces, verdicts = write_parts("whole", records), write_parts("pieces", records, [7, 100]), judge(records)

    def held(*options, files=whole):
        out = f"out{len([*Path().glob('out*')])}"
        run = ["data", "split", *map(str, files), "--out", out, "--workers", "1", *options]
        assert main(run) == 0
        *trained, found = (read_all(f"{out}/{name}") for name in ("contrastive", "rl", "holdout"))
        for kept in trained:
            for side in ("query_id", "target_id"):
                assert not {getattr(one, side) for one in kept} & {getattr(one, side) for one in found}
        return run, found, trained

    run, found, (train, rl) = held("--holdout", "0.1")
    assert len(found) == 30 and rl == [] and sorted(ids(found + train)) == sorted(ids(records))  # none is lost
    assert held("--holdout", "30", files=pieces)[1] == found != held("--holdout", "30", "--split-seed", "1")[1]
    other = {**os.environ, "PYTHONHASHSEED": "7"}
    run[run.index("--out") + 1] = "hashed"
    subprocess.run([sys.executable, "-m", "embedrl_verl.cli", *run], env=other, check=True, capture_output=True)
    assert read_all("hashed/holdout") == found
    _, found, (train, rl) = held("--holdout", "20", "--verdicts", verdicts)
    assert len(found) == 20 and {CYCLE[int(name[1:]) % 5] for name in ids(found)} == {"match"} and train and rl
    _, found, (train, rl) = held("--holdout", "20", "--rl-from", "all", "--rl-rows", "50")
    assert (len(found), len(train), len(rl)) == (20, 180, 100)
    capsys.readouterr()
    same = write_parts("same", [pair(f"p{i}", query_id="one", target_id=f"{i}") for i in range(9)])
    assert held("--holdout", "3", "--allow-short", files=same)[1] == []
    for files, holdout, message in (
        (same, "3", "--holdout: 3 pairs wanted, 0 can be held out"),
        (write_parts("bare", RECORDS[:9]), "3", "holdout compares query_ids and target_ids, and 9 pairs have none"),
        (same, "2.5", "holdout must be a share between 0 and 1 or a whole number of pairs; got 2.5"),
    ):
        assert main(["data", "split", str(files[0]), "--out", "refused", "--holdout", holdout]) in (2, 3)
        assert message in capsys.readouterr().err
