# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert import job as job_module
from embedrl_verl.convert.converter import RawRow
from embedrl_verl.convert.generic import GenericConverter
from embedrl_verl.convert.inputs import LocalRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.convert.sampling import sampling_from_options
from embedrl_verl.data.files import media_root_of, pair_files
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import ConfigError, DataError, EmbedRLError, ResourceError
from tests.convert.conftest import MAP, Convert, Draw, files_below, question, rejected, write_lines


def texts(folder: Path) -> list[str]:
    return [record.query.text for file in pair_files([folder]) for record in read_pairs(file)]


def test_rows_become_pairs_in_order_in_parts_of_the_wanted_size(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "in" / "b.jsonl", [question(index) for index in range(25)])
    write_lines(tmp_path / "in" / "a" / "x.jsonl", [question(100 + index) for index in range(3)])
    card = convert(tmp_path / "in")
    assert texts(tmp_path / "out") == [f"question {i}" for i in [100, 101, 102, *range(25)]]
    assert [part["records"] for part in card["parts"]] == [3, 10, 10, 5]
    first = next(read_pairs(tmp_path / "out" / "part-00000.parquet"))
    assert (first.pair_id, first.data_source) == ("own:a/x:0", "own")
    assert not (tmp_path / "out" / "_work").exists()


def test_worker_processes_give_the_same_folder_as_none(tmp_path: Path, convert: Convert, draw: Draw) -> None:
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"{index}.png").write_bytes(draw(index))
    rows = [question(index, image=f"{index % 4}.png") for index in range(60)]  # 3.png does not exist
    write_lines(tmp_path / "in" / "f.jsonl", [*rows, b"{broken", question(7)])
    convert(tmp_path / "in", "alone", workers=1, place="files")
    convert(tmp_path / "in", "together", workers=2, place="files")
    alone, together = files_below(tmp_path / "alone"), files_below(tmp_path / "together")
    assert alone == together
    assert len([name for name in alone if name.startswith("media/")]) == 3
    assert len(rejected(tmp_path / "alone")) == 16


def test_every_bad_row_is_listed_with_its_place_and_the_good_ones_are_kept(
    tmp_path: Path, convert: Convert, draw: Draw
) -> None:
    moving = draw(9, "GIF", frames=2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "moving.gif").write_bytes(moving)
    write_lines(
        tmp_path / "in" / "a.jsonl",
        [question(0), b"{broken", question(2, answer=5), question(3, image="moving.gif"), question(4, image="../x")],
    )
    rows = [question(index, image={"bytes": draw(index), "path": None}) for index in range(4)]
    rows[2]["image"] = {"bytes": b"junk", "path": "junk.png"}
    rows[3]["answer"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.parquet").write_bytes((tmp_path / "in" / "b.parquet").read_bytes()[:-30])
    card = convert(tmp_path / "in")
    assert texts(tmp_path / "out") == [f"question {i}" for i in (0, 3, 0, 1)]  # a.jsonl, b.parquet
    found = [
        (entry["file"], entry.get("row"), entry.get("line"), entry["field"]) for entry in rejected(tmp_path / "out")
    ]
    assert found == [
        ("c.parquet", None, None, ""),
        ("a.jsonl", None, 2, ""),
        ("a.jsonl", None, 3, "answer"),
        ("a.jsonl", None, 5, "query.images[0]"),
        ("b.parquet", 2, None, "query.images[0]"),
        ("b.parquet", 3, None, ""),
    ]
    assert rejected(tmp_path / "out")[3]["pair_id"] == "own:a:4"
    assert (card["rejected"]["rows"], card["rejected"]["files"]) == (5, 1)
    assert card["media"]["animated"] == 1
    assert card["by_source"]["own"] == {
        "rows": 9,
        "sampled": 9,
        "records": 4,
        "unused": 0,
        "rejected": 5,
        "kinds": {"query_image > target_text": 3, "query_text > target_text": 1},
    }


def test_too_many_bad_rows_stop_the_job_and_a_higher_limit_goes_on(tmp_path: Path, convert: Convert) -> None:
    rows = [question(index) if index % 5 else question(index, answer=index) for index in range(40)]
    write_lines(tmp_path / "in" / "f.jsonl", rows)
    with pytest.raises(DataError, match=r"8 of 40 rows cannot be used, over the limit of 10\.00%") as raised:
        convert(tmp_path / "in", max_bad_share=0.1, shard_rows=40)
    assert "8 x answer: must be a string; got … (int)" in str(raised.value)
    assert "f.jsonl, line 1, field answer: must be a string; got 0 (int)" in str(raised.value)
    assert len(rejected(tmp_path / "out")) == 8
    with pytest.raises(DataError, match="is unfinished"):
        pair_files([tmp_path / "out"])
    part = tmp_path / "out" / "_work" / "part-00000.parquet"
    made = part.stat().st_mtime_ns
    convert(tmp_path / "in", max_bad_share=0.2, shard_rows=40)
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns == made  # not made again
    assert len(texts(tmp_path / "out")) == 32


def test_a_share_at_the_limit_is_allowed(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(index, answer=None if index < 2 else "a") for index in range(20)])
    assert convert(tmp_path / "f.jsonl", max_bad_share=0.1)["records"] == 18


def test_too_many_unreadable_files_stop_the_job(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "in" / "f.jsonl", [question(0)])
    (tmp_path / "in" / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        DataError, match=r"1 of 2 files cannot be read to their end, over the limit of 10\.00%.*\n  torn\.parquet: "
    ):
        convert(tmp_path / "in", max_bad_share=0.1)


def test_the_first_record_of_an_id_stays(tmp_path: Path, convert: Convert) -> None:
    columns = {**MAP, "pair_id": "id"}
    ids = ["a", "b", "a", *[f"x{i}" for i in range(20)], "b", "c", "a"]
    write_lines(tmp_path / "in" / "f.jsonl", [question(i, id=name) for i, name in enumerate(ids)])
    write_lines(tmp_path / "in" / "g.jsonl", [question(100, id="c"), question(101, id=7)])
    card = convert(tmp_path / "in", columns=columns)
    kept = [record.pair_id for file in pair_files([tmp_path / "out"]) for record in read_pairs(file)]
    assert kept == ["a", "b", *[f"x{i}" for i in range(20)], "c", "7"]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in rejected(tmp_path / "out")] == [
        ("f.jsonl", 3, "must be unique; f.jsonl, line 1 has it too"),
        ("f.jsonl", 24, "must be unique; f.jsonl, line 2 has it too"),
        ("f.jsonl", 26, "must be unique; f.jsonl, line 1 has it too"),
        ("g.jsonl", 1, "must be unique; f.jsonl, line 25 has it too"),
    ]
    assert card["records"] == 24
    assert [part["records"] for part in card["parts"]] == [9, 10, 4, 1]


def test_ids_whose_hashes_agree_are_told_apart(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedrl_verl.convert import parts

    monkeypatch.setattr(parts, "blake2b", lambda text, digest_size: _Constant())
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(12)])
    assert convert(tmp_path / "f.jsonl")["records"] == 12


class _Constant:
    def digest(self) -> bytes:
        return bytes(8)


def test_an_id_for_all_rows_stops_the_job(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(30)])
    columns = {**MAP, "pair_id": {"value": "same"}}
    with pytest.raises(DataError, match=r"more than 3 of 30 rows have the pair_id of an earlier .*f\.jsonl, line 2,"):
        convert(tmp_path / "f.jsonl", columns=columns, max_bad_share=0.1)


def test_caps_draw_evenly_over_all_files_of_a_source(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [question(index) for index in range(15)])
    write_lines(tmp_path / "in" / "b.jsonl", [question(15 + index) for index in range(15)])
    card = convert(tmp_path / "in", caps={"own": 6})
    assert texts(tmp_path / "out") == [f"question {i}" for i in (0, 5, 10, 15, 20, 25)]
    assert (card["by_source"]["own"]["rows"], card["by_source"]["own"]["sampled"]) == (30, 6)
    with pytest.raises(ConfigError, match="--cap names the source 'other'; the input has own"):
        convert(tmp_path / "in", "else", caps={"other": 6})


def test_a_preset_caps_its_sources_and_the_card_prints_its_weights(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(5)])
    columns = {**MAP, "data_source": {"value": "visrag"}}
    sampling = sampling_from_options(["visrag=3"], "paper_caps")
    card = convert(tmp_path / "f.jsonl", columns=columns, sampling=sampling)
    assert (card["records"], card["sampling"]["weights"]) == (3, {"visrag": 6.0})
    text = (tmp_path / "out" / "data_card.md").read_text()
    assert "contrastive.source_weights={visrag: 6.0}" in text
    assert "Embed-RL" in text
    assert card["sampling"]["not_in_preset"] == []
    with pytest.raises(ConfigError, match="--cap names the source 'visrg'"):
        convert(tmp_path / "f.jsonl", columns=columns, sampling=sampling_from_options(["visrg=3"], "paper_caps"))


def test_a_source_that_the_preset_does_not_name_is_said_to_be_used_whole(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(5)])
    columns = {**MAP, "data_source": {"value": "vidore_colpali_pages"}}
    convert(tmp_path / "f.jsonl", columns=columns, sampling=sampling_from_options([], "vlm2vec_v2"))
    said = "The preset vlm2vec_v2 does not name vidore_colpali_pages: all rows are used."
    assert said in (tmp_path / "out" / "data_card.md").read_text()
    capped = sampling_from_options(["3"], "vlm2vec_v2")
    card = convert(tmp_path / "f.jsonl", "capped", columns=columns, sampling=capped)
    assert (card["records"], card["sampling"]["not_in_preset"]) == (3, [])


def times_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_a_finished_folder_is_left_alone_and_other_options_are_refused(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(12)])
    card = convert(tmp_path / "f.jsonl")
    before, written = files_below(tmp_path / "out"), times_below(tmp_path / "out")
    assert convert(tmp_path / "f.jsonl") == card
    assert files_below(tmp_path / "out") == before and times_below(tmp_path / "out") == written
    with pytest.raises(ConfigError, match="was made with other options or input: shard_rows was 10, is 5"):
        convert(tmp_path / "f.jsonl", shard_rows=5)
    assert len(convert(tmp_path / "f.jsonl", shard_rows=5, restart=True)["parts"]) == 3
    write_lines(tmp_path / "f.jsonl", [question(index) for index in range(13)])
    with pytest.raises(ConfigError, match=r"input\.files\[0\]\.bytes was"):
        convert(tmp_path / "f.jsonl", shard_rows=5)


def test_a_finished_folder_refuses_input_of_other_content_and_another_licence(tmp_path: Path, convert: Convert) -> None:
    source = write_lines(tmp_path / "f.jsonl", [question(1)])
    convert(tmp_path / "f.jsonl", licence="CC0")
    with pytest.raises(ConfigError, match="other options or input: licence was 'CC0', is 'MIT'; name another folder"):
        convert(tmp_path / "f.jsonl", licence="MIT")
    size = source.stat().st_size
    write_lines(source, [question(2)])
    assert source.stat().st_size == size
    with pytest.raises(
        ConfigError, match=r"other options or input: the SHA-256 of f\.jsonl was \w{64}, is \w{64}; name"
    ):
        convert(tmp_path / "f.jsonl", licence="CC0")
    convert(tmp_path / "f.jsonl", licence="MIT", restart=True)
    assert texts(tmp_path / "out") == ["question 2"]


def test_input_that_changes_between_two_starts_is_noticed(tmp_path: Path, convert: Convert) -> None:
    rows = [question(index, answer=None) for index in range(4)]
    write_lines(tmp_path / "f.jsonl", rows)
    with pytest.raises(DataError, match="4 of 4 rows cannot be used"):
        convert(tmp_path / "f.jsonl", max_bad_share=0.5)
    write_lines(tmp_path / "f.jsonl", rows)
    with pytest.raises(ConfigError, match="was begun with other options or input: stamps"):
        convert(tmp_path / "f.jsonl", max_bad_share=1.0)


def test_nothing_usable_is_an_error_and_no_folder_that_looks_finished(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(0, answer=None)])
    with pytest.raises(DataError, match="no pair could be made of 1 rows"):
        convert(tmp_path / "f.jsonl")
    with pytest.raises(DataError, match="is unfinished"):
        pair_files([tmp_path / "out"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file fits \*\*/\*\.parquet"):
        convert(tmp_path / "empty")


def test_the_output_is_not_its_own_input(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "f.jsonl", [question(0), b"{broken"])
    root = LocalRoot(tmp_path, without=tmp_path / "out")
    options = JobOptions(out=str(tmp_path / "out"), max_bad_share=0.9)
    converter = GenericConverter(None, "own", pattern="**/*.jsonl")
    write_lines(tmp_path / "f.jsonl", [{"query": "q", "target": "t"}, b"{broken"])
    assert run_conversion(root, converter, options)["records"] == 1
    assert run_conversion(root, converter, options)["records"] == 1  # rejected.jsonl is not read


def test_two_jobs_cannot_write_one_folder(tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "f.jsonl", [question(0)])
    seen = []

    def again(*args: object, **kwargs: object) -> object:
        with pytest.raises(ConfigError, match="another process is writing"):
            monkeypatch.undo()
            convert(tmp_path / "f.jsonl")
        seen.append(True)
        return make_card(*args, **kwargs)

    make_card = job_module.make_card
    monkeypatch.setattr(job_module, "make_card", again)
    convert(tmp_path / "f.jsonl")
    assert seen


def test_a_disk_that_fills_at_the_end_is_named_and_the_job_goes_on(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "f.jsonl", [question(0)])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_module, "write_atomically", full)
    with pytest.raises(
        ResourceError, match="out: the disk is full; what is finished is kept.*run the same command again"
    ):
        convert(tmp_path / "f.jsonl")
    monkeypatch.undo()
    assert convert(tmp_path / "f.jsonl")["records"] == 1


class Failing(GenericConverter):
    """A converter with a programming error at row 3."""

    def convert(self, row: RawRow) -> Iterator[PairRecord]:
        if row.row == 3:
            raise ZeroDivisionError("oops")
        yield PairRecord(row.pair_id(), "own", "", Item(text="q"), Item(text="\ud800" if row.row == 1 else "t"), "")


def test_a_fault_of_the_converter_stops_with_the_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", [{"n": index} for index in range(5)])
    with pytest.raises(EmbedRLError, match=r"failed on f\.jsonl, row 3: ZeroDivisionError: oops"):
        run_conversion(LocalRoot(tmp_path), Failing(None, "own"), JobOptions(out=str(tmp_path / "out")))


def test_text_that_is_no_unicode_is_a_bad_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", [{"n": index} for index in range(3)])
    options = JobOptions(out=str(tmp_path / "out"), max_bad_share=1.0)
    assert run_conversion(LocalRoot(tmp_path), Failing(None, "own"), options)["records"] == 2
    assert rejected(tmp_path / "out")[0]["field"] == "target.text"


def test_the_card_names_input_output_and_media_root(tmp_path: Path, convert: Convert, draw: Draw) -> None:
    import hashlib

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(draw(1))
    source = write_lines(tmp_path / "in" / "f.jsonl", [question(0, image="a.png"), question(1)])
    card = convert(tmp_path / "in", "kept", licence="CC0")
    assert card["licence"] == "CC0"
    assert card["input"]["files"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    part = tmp_path / "kept" / "part-00000.parquet"
    assert card["parts"][0]["sha256"] == hashlib.sha256(part.read_bytes()).hexdigest()
    assert media_root_of(tmp_path / "kept") == str(tmp_path / "in")
    assert convert(tmp_path / "in", "own", place="files")["media_root"] == "media"
    assert media_root_of(tmp_path / "own" / "part-00000.parquet") == str(tmp_path / "own" / "media")
    assert convert(tmp_path / "in", "inside", place="embed")["media_root"] is None
    text = (tmp_path / "kept" / "data_card.md").read_text()
    assert "Licence: CC0." in text
    assert "| own | 2 | 2 | 2 | 0 | 0 | query_image > target_text (1), query_text > target_text (1) |" in text
    json.loads((tmp_path / "kept" / "data_card.json").read_text())
