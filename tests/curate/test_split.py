# SPDX-License-Identifier: Apache-2.0
"""Every pair goes where its verdict says, RL draws are exact, and nothing depends on files or processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert.sampling import preset
from embedrl_verl.curate.split import FATES
from embedrl_verl.curate.split_job import split_pairs
from embedrl_verl.curate.split_settings import SplitSettings
from embedrl_verl.data.files import REJECTED_FILE, media_root_of
from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError

MakePair = Callable[..., PairRecord]
WriteParts = Callable[..., list[Path]]
ReadAll = Callable[[Path], list[PairRecord]]
CYCLE = ("match", "mismatch", "match", "mismatch", "unknown")
EACH = {"workers": 1, "rows_per_part": 100}


@pytest.fixture
def records(pair: MakePair) -> list[PairRecord]:
    """250 pairs of two sources in turn, so that source a has the even rows."""
    return [pair(f"p{i}", source="ab"[i % 2]) for i in range(250)]


def judge(tmp_path: Path, records: Sequence[PairRecord], verdicts: Sequence[str] = CYCLE, name: str = "v") -> Path:
    """A verdict file; the verdicts are repeated over the records."""
    file = tmp_path / f"{name}.parquet"
    rows = [{"pair_id": record.pair_id, "verdict": verdicts[i % len(verdicts)]} for i, record in enumerate(records)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def ids(records: Sequence[PairRecord]) -> list[str]:
    return [record.pair_id for record in records]


def of(records: Sequence[PairRecord], verdict: str, source: str = "ab") -> list[str]:
    return [r.pair_id for i, r in enumerate(records) if CYCLE[i % len(CYCLE)] == verdict and r.data_source in source]


def test_matches_train_the_embedder_and_drawn_mismatches_the_reasoner(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, read_all: ReadAll
) -> None:
    files = write_parts("in", records, [90])
    report = split_pairs(
        files, judge(tmp_path, records), tmp_path / "out", SplitSettings(rl_rows={"a": 7, "b": 50}), **EACH
    )
    contrastive, rl = read_all(tmp_path / "out" / "contrastive"), read_all(tmp_path / "out" / "rl")
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
    source = report.sources["a"]
    assert (source.pairs, source.candidates, source.wanted) == (125, 50, 7)
    assert source.verdicts == {"match": 50, "mismatch": 50, "unknown": 25}
    assert source.fates == {"contrastive": 50, "rl": 7, FATES[3]: 43, FATES[4]: 25}
    assert sum(sum(source.fates.values()) for source in report.sources.values()) == 250


@pytest.mark.parametrize("rl_from", ["match", "all"])
def test_both_readings_of_the_paper(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, read_all: ReadAll, rl_from: str
) -> None:
    files, verdicts = write_parts("in", records), judge(tmp_path, records)
    settings = SplitSettings(rl_from=rl_from, rl_rows_each=10)  # type: ignore[arg-type]
    split_pairs(files, verdicts, tmp_path / "apart", settings, **EACH)
    rl = ids(read_all(tmp_path / "apart" / "rl"))
    assert len(rl) == 20
    assert set(rl) <= set(of(records, "match")) or rl_from == "all"
    assert ids(read_all(tmp_path / "apart" / "contrastive")) == [
        name for name in of(records, "match") if name not in rl
    ]
    both = SplitSettings(rl_from=rl_from, rl_rows_each=10, keep_rl_matches=True)  # type: ignore[arg-type]
    split_pairs(files, verdicts, tmp_path / "both", both, **EACH)
    assert ids(read_all(tmp_path / "both" / "rl")) == rl
    assert ids(read_all(tmp_path / "both" / "contrastive")) == of(records, "match")


def test_without_verdicts_rl_draws_from_all_and_the_rest_matches(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, read_all: ReadAll
) -> None:
    files = write_parts("in", records)
    with pytest.raises(ConfigError, match="needs verdicts"):
        split_pairs(files, None, tmp_path / "out", **EACH)
    report = split_pairs(files, None, tmp_path / "out", SplitSettings(rl_from="all", rl_rows_each=25), **EACH)
    assert len(read_all(tmp_path / "out" / "rl")) == 50
    assert len(read_all(tmp_path / "out" / "contrastive")) == 200
    assert report.sources["a"].verdicts == {}


def test_unknown_pairs_and_sources_can_be_left_out_or_kept(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, read_all: ReadAll
) -> None:
    settings = SplitSettings(unknown="match", contrastive_without=("b", "not in the data"), rl_rows_each=0)
    report = split_pairs(write_parts("in", records), judge(tmp_path, records), tmp_path / "out", settings, **EACH)
    wanted = {*of(records, "match", "a"), *of(records, "unknown", "a")}
    assert set(ids(read_all(tmp_path / "out" / "contrastive"))) == wanted
    assert read_all(tmp_path / "out" / "rl") == []
    assert report.sources["b"].fates == {FATES[5]: 75, FATES[3]: 50}


@pytest.mark.parametrize("sampling", ["even", "random"])
def test_the_split_depends_neither_on_files_nor_on_processes(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, read_all: ReadAll, sampling: str
) -> None:
    settings = SplitSettings(rl_rows_each=9, sampling=sampling, seed=3)  # type: ignore[arg-type]
    verdicts = judge(tmp_path, records)
    for name, sizes, workers in (("one", [], 1), ("two", [1, 100, 30], 2)):
        files = write_parts(f"in_{name}", records, sizes)
        split_pairs(files, verdicts, tmp_path / name, settings, workers=workers, rows_per_part=40)
    for part in ("contrastive", "rl"):
        assert read_all(tmp_path / "one" / part) == read_all(tmp_path / "two" / part)
        names = [path.name for path in sorted((tmp_path / "one" / part).glob("*.parquet"))]
        assert names == [path.name for path in sorted((tmp_path / "two" / part).glob("*.parquet"))]
    other = SplitSettings(rl_rows_each=9, sampling=sampling, seed=4)  # type: ignore[arg-type]
    split_pairs(write_parts("in", records), verdicts, tmp_path / "other", other, **EACH)
    same = read_all(tmp_path / "other" / "rl") == read_all(tmp_path / "one" / "rl")
    assert same == (sampling == "even")  # the seed is of random draws alone


def test_the_preset_is_the_13_sets_and_missing_ones_are_named(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    wanted = preset("rl_13").caps
    assert len(wanted) == 13 and sum(wanted.values()) == 19_000
    sources = [name for name in wanted if name != "visrag"] + ["vidore_colpali_pages"]
    records = [
        pair(f"{source}:{i}", source=source) for source in sources for i in range(2 if source == "mmeb_cirr" else 4)
    ]
    files, verdicts = write_parts("in", records), judge(tmp_path, records, ["mismatch"])
    small = dict.fromkeys(wanted, 3)
    with pytest.raises(DataError) as error:
        split_pairs(files, verdicts, tmp_path / "out", SplitSettings(rl_preset="rl_13", rl_rows=small), **EACH)
    for text in (
        "2 of 13 sources",
        "mmeb_cirr: 3 pairs wanted, 2 of them",
        "visrag: 3 pairs wanted, the data have no such source",
        "vidore_colpali_pages (4)",
        "--allow-short",
    ):
        assert text in str(error.value)
    settings = SplitSettings(rl_preset="rl_13", rl_rows=small, allow_short=True)
    report = split_pairs(files, verdicts, tmp_path / "out", settings, **EACH)
    assert len(read_all(tmp_path / "out" / "rl")) == 11 * 3 + 2
    assert report.sources["vidore_colpali_pages"].candidates == 0  # not named: no RL pairs of it
    assert report.sources["mmeb_cirr"].wanted == 3


def test_targets_in_both_sets_are_counted_and_can_be_kept_apart(
    tmp_path: Path, pair: MakePair, write_parts: WriteParts, read_all: ReadAll
) -> None:
    names = ["content-text:" + "0" * 32, "content-media:" + "1" * 32, "own", "answer:yes", "content-media:" + "2" * 32]
    records = [pair(f"{kind}{i}", target_id=name) for kind in ("match", "mismatch") for i, name in enumerate(names[:4])]
    records.append(pair("match4", target_id=names[4]))
    queries = {"match0": "a", "match3": "a", "match4": "b", "mismatch1": "a"}
    records = [replace(record, query_id=queries.get(record.pair_id, "")) for record in records]
    verdicts = judge(tmp_path, records, ["match"] * 4 + ["mismatch"] * 4 + ["match"])
    files = write_parts("in", records)
    left = {}
    for disjoint in ("off", "media", "all"):
        out = tmp_path / disjoint
        report = split_pairs(files, verdicts, out, SplitSettings(disjoint_targets=disjoint), **EACH)  # type: ignore[arg-type]
        left[disjoint] = ids(read_all(out / "contrastive"))
        assert len(read_all(out / "rl")) == 4
        if disjoint == "off":
            shared = report.shared
            assert (shared.media, shared.text, shared.contents, shared.queries) == (2, 2, 4, 2)
            assert "2 contrastive pairs have a query that RL has too" in report.lines()
    assert left == {
        "off": ["match0", "match1", "match2", "match3", "match4"],
        "media": ["match0", "match3", "match4"],
        "all": ["match4"],
    }
    with pytest.raises(ConfigError, match="keep_rl_matches"):
        SplitSettings(disjoint_targets="all", keep_rl_matches=True)
    bare = write_parts("bare", [pair("p0"), pair("p1")])
    two = judge(tmp_path, [pair("p0"), pair("p1")], ["match", "mismatch"], "two")
    with pytest.raises(DataError, match="2 pairs have none; fill them first with embedrl data content-ids"):
        split_pairs(bare, two, tmp_path / "bare_out", SplitSettings(disjoint_targets="media"), **EACH)
    assert split_pairs(bare, two, tmp_path / "bare_out", **EACH).shared.without_id == 2


def test_verdicts_must_fit_the_data_one_to_one(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts, pair: MakePair, read_all: ReadAll
) -> None:
    files = write_parts("in", records)
    cases = {
        "missing": (records[2:], r"2 pairs have no verdict: p0, p1\."),
        "extra": ([*records, pair("x1"), pair("x2")], r"2 verdicts have no pair in the data: x1, x2"),
        "double": ([*records, records[4]], r"1 verdicts come twice: p4"),
        "other": ([pair(f"o{i}") for i in range(250)], r"250 pairs have no verdict: p0, .* and 245 more.*250 verdicts"),
    }
    for name, (judged, message) in cases.items():
        with pytest.raises(DataError, match=message):
            split_pairs(files, judge(tmp_path, judged, name=name), tmp_path / name, **EACH)
    with pytest.raises(DataError, match=r"odd\.parquet, row 1: verdict must be one of match, .*got 'maybe'"):
        split_pairs(files, judge(tmp_path, records, ["match", "maybe"], "odd"), tmp_path / "odd", **EACH)
    pq.write_table(pa.table({"pair_id": ["p0"]}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match="column 'verdict' is missing; the file has pair_id"):
        split_pairs(files, tmp_path / "half.parquet", tmp_path / "half", **EACH)
    # another order is no fault
    turned = pq.read_table(judge(tmp_path, records)).take(np.random.default_rng(0).permutation(250))
    pq.write_table(turned, tmp_path / "turned.parquet")
    split_pairs(files, tmp_path / "turned.parquet", tmp_path / "turned", **EACH)
    split_pairs(files, judge(tmp_path, records), tmp_path / "straight", **EACH)
    assert read_all(tmp_path / "turned" / "rl") == read_all(tmp_path / "straight" / "rl") != []


def test_bad_rows_are_named_and_left_out_wherever_they_are_found(
    tmp_path: Path, pair: MakePair, read_all: ReadAll
) -> None:
    write_pairs([pair(f"p{i}") for i in range(8)], tmp_path / "good.parquet")
    rows = pq.read_table(tmp_path / "good.parquet").to_pylist()
    rows[1]["pair_id"] = None
    rows[2]["data_source"] = ""
    rows[4]["pair_id"] = "p3"  # a double
    rows[5]["target"]["text"] = " "  # found when it is written
    rows[6]["query"]["kind"] = "scan"  # found because the judge gave it no verdict
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=3)
    verdicts = judge(tmp_path, [pair(f"p{i}") for i in (0, 3, 5, 7)], ["match"])
    out = tmp_path / "out"
    report = split_pairs([file], verdicts, out, SplitSettings(), max_bad_share=0.7, **EACH)
    assert ids(read_all(out / "contrastive")) == ["p0", "p3", "p7"]
    assert (report.exit_code, report.rejected, report.sources["s"].pairs) == (DataError.exit_code, 5, 3)
    assert report.sources["s"].fates["contrastive"] == 3
    lines = [json.loads(line) for line in (out / REJECTED_FILE).read_text().splitlines()]
    assert [(line["row"], line["field"]) for line in lines] == [
        (1, ""),
        (2, ""),
        (4, "pair_id"),
        (5, ""),
        (6, "query"),
    ]
    assert "row 3 has 'p3' too" in lines[2]["reason"]
    fates = pq.read_table(out / "split.parquet")["fate"].to_pylist()
    assert [place for place, fate in enumerate(fates) if fate == "rejected"] == [1, 2, 4, 5, 6]
    with pytest.raises(DataError, match=r"of 8 rows cannot be used, over the limit of 10.00%"):
        split_pairs([file], verdicts, tmp_path / "strict", max_bad_share=0.1, **EACH)


def test_the_sets_are_data_set_folders_with_cards(
    tmp_path: Path, records: list[PairRecord], write_parts: WriteParts
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    split_pairs(write_parts("in", records), judge(tmp_path, records), tmp_path / "out", media_root=str(media), **EACH)
    for name, pairs in (("contrastive", 100), ("rl", 100)):
        card = json.loads((tmp_path / "out" / name / "data_card.json").read_text())
        assert (card["records"], sum(part["records"] for part in card["parts"])) == (pairs, pairs)
        assert card["by_source"] == {"a": {"records": 50}, "b": {"records": 50}}
        assert media_root_of(tmp_path / "out" / name) == str(media)
        assert not (tmp_path / "out" / name / "_work").exists()
