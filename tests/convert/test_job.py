# SPDX-License-Identifier: Apache-2.0
"""A conversion: order, parts, ids, caps and presets, the data card, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.convert.converter import Converter, RawRow, Shard
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.job import JobOptions, run_conversion
from embedrl_verl.data.files import begin_work, media_root_of
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import ConfigError, DataError, EmbedRLError
from tests.convert.conftest import Convert, draw, files_below, question, questions, records, rejected, write_lines


def texts(folder: Path) -> list[str]:
    return [record.query.text for record in records(folder)]


def test_rows_become_pairs_in_order_in_parts_of_the_wanted_size(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "in" / "b.jsonl", questions(range(25)))
    write_lines(tmp_path / "in" / "a" / "x.jsonl", questions(range(100, 103)))
    card = convert(tmp_path / "in")
    assert texts(tmp_path / "out") == [f"question {i}" for i in [100, 101, 102, *range(25)]]
    assert [part["records"] for part in card["parts"]] == [3, 10, 10, 5]
    first = records(tmp_path / "out")[0]
    assert (first.pair_id, first.data_source) == ("own:a/x:0", "own")
    assert not (tmp_path / "out" / "_work").exists()


def test_worker_processes_give_the_same_folder_as_none(tmp_path: Path, convert: Convert) -> None:
    rows = [question(index, image=f"{index % 4}.png") for index in range(40)]  # 3.png does not exist
    source = write_lines(tmp_path / "in" / "f.jsonl", [*rows, b"{broken"])
    for index in range(3):
        (tmp_path / "in" / f"{index}.png").write_bytes(draw(index))
    for workers in (1, 2):
        convert(source, f"out {workers}", workers=workers, media="files")
    assert files_below(tmp_path / "out 1") == files_below(tmp_path / "out 2")
    assert len(list((tmp_path / "out 1/media").rglob("*.png"))) == 3
    assert len(rejected(tmp_path / "out 1")) == 11


def test_the_first_record_of_an_id_stays(tmp_path: Path, convert: Convert) -> None:
    ids = ["a", "b", "a", *[f"x{i}" for i in range(20)], "b", "c", "a"]
    rows = [question(i, id=name) for i, name in enumerate(ids)]
    write_lines(tmp_path / "in" / "f.jsonl", [rows[0], b"{broken", b"", *rows[1:]])
    write_lines(tmp_path / "in" / "g.jsonl", [question(100, id="c"), question(101, id=7)])
    card = convert(tmp_path / "in", "out", "pair_id=id")
    assert [record.pair_id for record in records(tmp_path / "out")] == [*dict.fromkeys(ids), "7"]
    repeated = [entry for entry in rejected(tmp_path / "out") if entry["field"] == "pair_id"]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in repeated] == [
        ("f.jsonl", 5, "must be unique; f.jsonl, line 1 has it too"),
        ("f.jsonl", 26, "must be unique; f.jsonl, line 4 has it too"),
        ("f.jsonl", 28, "must be unique; f.jsonl, line 1 has it too"),
        ("g.jsonl", 1, "must be unique; f.jsonl, line 27 has it too"),
    ]
    assert [part["records"] for part in card["parts"]] == [7, 10, 6, 1]
    write_lines(tmp_path / "same.jsonl", questions(range(30), id="same"))
    with pytest.raises(DataError, match=r"of 30 rows cannot be used.*\n.*pair_id: must be unique.*jsonl, line 2,"):
        convert(tmp_path / "same.jsonl", "same", "pair_id=id", max_bad_share=0.1)


def test_caps_draw_evenly_over_all_files_of_a_source(tmp_path: Path, convert: Convert) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", questions(range(15)))
    write_lines(tmp_path / "in" / "b.jsonl", questions(range(15, 30)))
    card = convert(tmp_path / "in", cap=("own=6",))
    assert texts(tmp_path / "out") == [f"question {i}" for i in (0, 5, 10, 15, 20, 25)]
    assert (card["by_source"]["own"]["rows"], card["by_source"]["own"]["sampled"]) == (30, 6)
    for options in ({}, {"preset": "paper_caps"}):
        with pytest.raises(ConfigError, match="--cap names the source 'visrg'; the input has own"):
            convert(tmp_path / "in", "else", cap=("visrg=6",), **options)
    assert not (tmp_path / "else").exists()


def test_a_preset_caps_its_sources_and_the_card_says_what_it_does_not_name(tmp_path: Path, convert: Convert) -> None:
    source = write_lines(tmp_path / "f.jsonl", questions(range(5)))
    card = convert(source, name="visrag", cap=("visrag=3",), preset="paper_caps")
    assert (card["records"], card["sampling"]["weights"], card["sampling"]["not_in_preset"]) == (3, {"visrag": 6}, [])
    text = (tmp_path / "out" / "data_card.md").read_text()
    assert "contrastive.source_weights={visrag: 6.0}" in text and "Embed-RL" in text
    for out, caps, count in (("all", (), 5), ("capped", ("3",), 3)):
        card = convert(source, out, name="vidore_colpali_pages", preset="vlm2vec_v2", cap=caps)
        assert card["records"] == count
        said = "The preset vlm2vec_v2 does not name vidore_colpali_pages: all rows are used."
        assert (said in (tmp_path / out / "data_card.md").read_text()) == (count == 5)


def test_a_finished_folder_is_left_alone_and_other_options_or_input_are_refused(
    tmp_path: Path, convert: Convert
) -> None:
    source = write_lines(tmp_path / "f.jsonl", questions(range(12)))
    card = convert(source, licence="CC0")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert convert(source, licence="CC0") == card
    write_lines(source, reversed(questions(range(12))))  # of the same size
    for options, message in (
        ({"shard_rows": 5, "licence": "CC0"}, r"settings\.shard_rows was 10, is 5; name another folder"),
        ({"licence": "MIT"}, "licence was 'CC0', is 'MIT'"),
        ({"licence": "CC0"}, r"input\[0\]\.sha256 was '\w{64}', is '"),
    ):
        with pytest.raises(ConfigError, match=f"was made with other options or input: {message}"):
            convert(source, **options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written


def test_nothing_usable_is_an_error_with_its_causes_and_no_folder_that_looks_finished(
    tmp_path: Path, convert: Convert
) -> None:
    write_lines(tmp_path / "bad.jsonl", [question(0, answer=None)] * 3)
    write_lines(tmp_path / "empty.jsonl", [])
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "zero.parquet")
    (tmp_path / "folder").mkdir()
    none = "no pair could be made of 0 rows: the converter uses none"
    for name, message in (
        ("bad.jsonl", r"no pair could be made of 3 rows. Causes:\n  3 x target must have text"),
        *(("empty.jsonl", none), ("zero.parquet", none)),
        ("folder", r"no file fits \*\*/\*\.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            convert(tmp_path / name, f"{name} out")
        assert not (tmp_path / f"{name} out/data_card.json").exists()
    assert len(rejected(tmp_path / "bad.jsonl out")) == 3


def test_a_file_is_read_under_one_name_and_an_unfinished_folder_not_at_all(tmp_path: Path, convert: Convert) -> None:
    for name in ("chosen", "rejected", ".ipynb_checkpoints/chosen-checkpoint", "made/rejected"):
        write_lines(tmp_path / f"{name}.jsonl", [question(0), b"{broken"])
    (tmp_path / "made/data_card.json").write_text("{}")
    for _ in range(2):  # the output is not its own input
        assert list(convert(tmp_path)["input_rows"]) == ["chosen.jsonl", "rejected.jsonl"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "chosen.jsonl")
    with pytest.raises(DataError, match=r"link\.jsonl is chosen\.jsonl under another name \(a link\)"):
        convert(tmp_path)
    begin_work(tmp_path / "made", ["embedrl", "data"])
    with pytest.raises(DataError, match=r"/made is unfinished \(it has _work/\); finish it with: embedrl data"):
        convert(tmp_path)


class Failing(Converter):
    """A converter with a programming error at row 3."""

    name = "failing"

    def shards(self, root: InputRoot) -> list[Shard]:
        return [Shard(file, "own") for file in root.files("*.jsonl")]

    def convert(self, row: RawRow) -> PairRecord:
        if row.values["n"] == 3:
            raise ZeroDivisionError("oops")
        target, negative = (Item(text="\ud800" if row.row == bad else "t") for bad in (1, 2))
        return PairRecord(row.pair_id(), "own", "", Item(text="q"), target, negatives=(negative,))


def test_a_fault_of_the_converter_stops_with_the_row_and_text_that_is_no_unicode_is_a_bad_row(tmp_path: Path) -> None:
    options = JobOptions(str(tmp_path / "in"), str(tmp_path / "out"), max_bad_share=1.0, workers=1)
    write_lines(tmp_path / "in" / "f.jsonl", [{"n": index} for index in range(5)])
    with pytest.raises(EmbedRLError, match=r"failed on f\.jsonl, row 3: ZeroDivisionError: oops"):
        run_conversion(Failing(), options)
    write_lines(tmp_path / "in" / "f.jsonl", [{"n": index} for index in range(3)])
    assert run_conversion(Failing(), replace(options, out=str(tmp_path / "other")))["records"] == 1
    assert [entry["field"] for entry in rejected(tmp_path / "other")] == ["target.text", "negatives[0].text"]


def test_the_card_names_input_output_and_media_root(tmp_path: Path, convert: Convert) -> None:
    source = write_lines(tmp_path / "in" / "f.jsonl", [question(0, image="a.png"), question(1), b"{"])
    (tmp_path / "in" / "a.png").write_bytes(draw(1, "GIF", frames=2))
    stale = write_lines(tmp_path / "files/media/ab/.a.gif.7-0.tmp", [])  # of a killed writer
    card, part = convert(source, "keep", licence="CC0"), tmp_path / "keep" / "part-00000.parquet"
    assert card["build"]["input"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert card["parts"][0]["sha256"] == hashlib.sha256(part.read_bytes()).hexdigest()
    assert (card["licence"], card["input_rows"]) == ("CC0", {"f.jsonl": 3})
    assert json.loads((tmp_path / "keep" / "data_card.json").read_text()) == card
    for place, root in (("keep", tmp_path / "in"), ("files", tmp_path / "files" / "media"), ("embed", None)):
        convert(source, place, media=place, licence="CC0")
        assert media_root_of(tmp_path / place) == (root and str(root))
    text = (tmp_path / "keep" / "data_card.md").read_text()
    assert not stale.exists()
    assert "Licence: CC0." in text and "1 images are animated" in text
    assert "| own | 3 | 3 | 2 | 0 | 1 | query_image > target_text (1), query_text > target_text (1) |" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"media": "link"}, "media must be one of keep, embed, files; got 'link'"),
        ({"verify": "all"}, "verify must be one of none, exists, decode; got 'all'"),
        ({"shard_rows": 0}, "at least 1"),
        ({"max_bad_share": 1.5}, "between 0 and 1; got 1.5"),
    ],
)
def test_values_that_cannot_work_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JobOptions("in", "out", **given)
