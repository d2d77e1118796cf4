# SPDX-License-Identifier: Apache-2.0
"""A user's own rows: column maps, the command, and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data_preprocess.generic import Generic
from embedrl_verl.convert.column_map import column_map, columns_of, load_column_map
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import RawRow, RowError, Shard
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError
from tests.convert.conftest import draw, records, write_lines

QT = {"query": "q", "target": "t"}


def one(plain: dict[str, Any] | None, values: dict[str, Any]) -> PairRecord:
    converter = Generic()
    if plain is not None:
        mapping = column_map(plain, "map")
        vars(converter).update(mapping=mapping, names=columns_of(mapping))
    return converter.convert(RawRow(Shard("dir/f.jsonl", "", note="fallback"), 7, values))


def command(*options: Any) -> int:
    return convert_main(Generic, "generic", ["--workers", "1", *map(str, options)])


def test_a_map_reaches_into_lists_and_structs_and_joins_columns() -> None:
    title = {"template": "{title}: {turns[0].value} ({year}) {{{2nd}}}"}
    plain = {
        "data_source": {"value": "birds"},
        "instruction": "say",
        "pair_id": "id",
        "target_id": "meta.group",
        "query_id": "a.b",  # a column of that very name wins
        "query": {"text": title, "images": "photos", "kind": {"value": "page"}},
        "target": {"video": "frames", "fps": 2, "tcot": "thought.deep", "instruction": {"value": "Describe."}},
        "negatives": [{"text": "wrong"}, {"images": "bad_photos"}],
    }
    values = {
        **{"say": "Find it.", "id": 12, "meta": {"group": "g1"}, "a.b": 7, "a": {"b": "part"}, "title": "Heron"},
        **{"turns": [{"value": "where?"}], "year": 1999, "2nd": 2, "frames": ["0.jpg", "1.jpg"], "thought": None},
        **{"photos": ["a.png", {"bytes": b"png", "path": "name.png"}], "wrong": ["x", "", "y"], "bad_photos": "c.png"},
    }
    assert one(plain, values) == PairRecord(
        pair_id="12",
        data_source="birds",
        instruction="Find it.",
        query=Item(text="Heron: where? (1999) {2}", images=("a.png", b"png"), kind="page"),
        target=Item(video=Video(frames=("0.jpg", "1.jpg"), fps=2.0), instruction="Describe."),
        target_id="g1",
        query_id="7",
        negatives=(Item(text="x"), Item(text="y"), Item(images=("c.png",))),
    )


def test_without_a_map_a_row_is_a_pair_record() -> None:
    values = {
        **{"pair_id": "p", "data_source": "s", "instruction": "Find it.", "note": "ignored"},
        "query": {"text": "q", "video": {"path": "c.mp4", "frames": None, "fps": 1.5}},
        "target": {"images": [{"path": "a.png"}], "video": None, "kind": None},
        "negatives": ["n", {"images": ["b.png"]}],
    }
    query, negatives = Item(text="q", video=Video(path="c.mp4", fps=1.5)), (Item(text="n"), Item(images=("b.png",)))
    assert one(None, values) == PairRecord("p", "s", "Find it.", query, Item(images=("a.png",)), "", negatives)
    for plain, row in ((None, {"query": "a", "target": "b"}), (QT, {"q": "a", "t": "b"})):  # numbered, and named after
        assert one(plain, row) == PairRecord("fallback:dir/f:7", "fallback", "", Item("a"), Item("b"))  # the input
    record = one({**QT, "data_source": "s"}, {"q": "a", "t": "b", "s": "mine"})
    assert (record.pair_id, record.data_source) == ("mine:dir/f:7", "mine")


@pytest.mark.parametrize(
    ("plain", "change", "message"),
    [
        ({"target": "x"}, {}, "field x: 'x' is not in the row, which has q, t"),
        ({}, {"q": 5}, r"field q: must be a string; got 5 \(int\)"),
        ({"query": "q[1]"}, {"q": ["a"]}, r"field q\[1\]: '\[1\]' is not in q, which has"),
        ({"query": "q[1]"}, {}, r"'\[1\]' is not in q, which has 'abc' \(str\)"),
        ({"query": {"images": "q"}}, {"q": [7]}, r"field q\[0\]: must be a path, the bytes"),
        ({"query": {"video": "q"}}, {"q": []}, "field q: video must have exactly one of"),
        *(({"query": {"video": "q", "fps": "f"}}, {"f": rate}, "field f: must be a nu") for rate in ("2", True)),
        ({"query": {"video": "q", "fps": "f"}}, {"f": -1}, "field q: video.fps"),
        ({"query": {"text": "q", "kind": "k"}}, {"k": "x"}, "field query: kind must"),
        ({"negatives": {"text": "n", "images": "m"}}, {"n": ["x"], "m": ["y", "z"]}, "equally long; got n 1, m 2"),
        ({"negatives": {"text": "n"}}, {"n": ["x", 5]}, r"field n: must be a string; got 5"),
        ({"query": {"text": {"value": 5}}}, {}, "field query.text: must be a string; got 5"),
        ({"target": {"images": {"value": [7]}}}, {}, r"field target\.images\[0\]: must be a path"),
        ({"instruction": {"value": ["x"]}}, {}, "field instruction: must be a string"),
        ({"target": {"video": "v", "fps": "f"}}, {"v": {"path": "c.mp4", "fps": 1}, "f": "2"}, "field f: must be a nu"),
        ({"target": {"video": "v"}}, {"v": {"path": "c.mp4", "fps": "2"}}, r"field v\.fps: must be a number; got '2'"),
        (None, {"query": "a"}, "field target: the column is missing; the row has q, t, query"),
        (None, {"query": "a", "target": 5}, "field target: must be a text or an object; got 5"),
        (None, {"query": {"txt": "a"}, "target": "b"}, r"field query\.txt: unknown field; known are text, images"),
        (None, {"query": "a", "target": "b", "pair_id": []}, r"field pair_id: must be a string; got \[\]"),
        (None, {"query": "a", "target": "b", "negatives": "n"}, "field negatives: must be a list; got 'n'"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused_by_its_column(plain: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        one(None if plain is None else QT | plain, {"q": "abc", "t": "b", **change})


TEMPLATES = ("{year", "a } b", "{q!}", "{q} {}", "{ }", "{year:04d} {q}", "{q!r:>9}")
RATES = (True, 0, *({"value": rate} for rate in (False, "fast", [2], "-1", "nan", "inf")))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"target": None}, "map: target: must be a column, or a mapping of"),
        ({"txt": "x"}, "map: unknown key 'txt'; known are pair_id"),
        ({"query": {"picture": "q"}}, "map: query: unknown key 'picture'; known are text, images"),
        *(({"query": {"text": text}}, r"map: query\.text: must be a column, \{") for text in (5, "", {"values": 5})),
        *(({"instruction": {"template": text}}, "map: instruction: a template is words and col") for text in TEMPLATES),
        *(({"negatives": {"video": "v", "fps": fps}}, r"map: negatives\[0\]\.fps: a constant mu") for fps in RATES),
    ],
)
def test_a_wrong_map_is_refused_before_anything_is_read(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        column_map(QT | plain, "map")


def test_the_command_line_writes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("query: q\ntarget: {text: t}\n")
    values = ["instruction=Find = it.", "query.fps=2"]
    columns = load_column_map(str(file), ["target.text=other", "query.video=film"], values)
    plain = {"instruction": {"value": "Find = it."}, "query": {"text": "q", "video": "film", "fps": 2}}
    assert columns == column_map({**plain, "target": "other"}, "map")
    assert load_column_map("") is None
    for text in ("query", "=x", "query.text="):
        with pytest.raises(ConfigError, match=r"--column takes KEY=\.\.\."):
            load_column_map("", [text])
    with pytest.raises(ConfigError, match="target is missing; a pair needs both sides"):
        load_column_map("", ["query=q"])
    with pytest.raises(ConfigError, match="the column map says data_source, and --source too"):
        Generic(column=("query=q", "target=t", "data_source=s"), source="mine")
    file.write_text("query: [")
    with pytest.raises(ConfigError, match=r"map\.yaml: not a readable column map"):
        load_column_map(str(file))


def test_one_command_from_jsonl_to_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(draw(1))
    source = write_lines(tmp_path / "My Birds.jsonl", [{"q": "what?", "a": "heron", "i": "a.png"}] * 3)
    given = ["--input", source, "--out", tmp_path / "out", "--media", "files", "--licence", "CC0"]
    columns = ["--column", "query.text=q", "query.images=i", "--column", "target.text=a"]
    assert command(*given, *columns) == 0
    said = capsys.readouterr().out
    assert "my_birds" in said
    assert f"3 pairs in 1 file(s): {tmp_path / 'out'} (media root {tmp_path / 'out' / 'media'})" in said
    (first, *_) = records(tmp_path / "out")
    assert (first.pair_id, first.data_source, first.query.text) == ("my_birds:My Birds:0", "my_birds", "what?")
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["build"]["settings"]["columns"]["query"] == {"text": "q", "images": "i"}
    assert command(*given, "--column", "query=a", "target=q") == 2  # another map


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "f.jsonl", [{"query": "a", "target": "b"}, {"query": "a"}])
    given = ("--input", source, "--out", tmp_path / "out")
    assert command(*given) == 3
    assert "1 of 2 rows cannot be used, over the limit of 1.00%" in capsys.readouterr().err
    assert command(*given, "--max-bad-share", "0.5") == 3  # the good row is there
    assert "- 1 x target: the column is missing" in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 1
    for wrong in (("--cap", "many"), ("--columns", tmp_path / "none.yaml")):
        assert command(*given, *wrong) == 2
    assert command("--input", tmp_path / "gone", "--out", tmp_path / "else") == 3
    clean = write_lines(tmp_path / "clean.jsonl", [{"query": "a", "target": "b"}])
    assert command("--input", clean, "--out", tmp_path / "clean") == 0
    for usage in (("--input", clean), ("--input", clean, "--out", tmp_path / "clean", "--rest")):
        with pytest.raises(SystemExit, match="2"):
            command(*usage)


def test_our_own_files_and_folders_of_datasets_are_read(tmp_path: Path) -> None:
    pairs = [
        PairRecord("p0", "s", "Find it.", Item(text="q"), Item(images=(draw(0),)), "id", (Item(text="n"),)),
        PairRecord("p1", "r", "", Item(text="q"), Item(video=Video(frames=(draw(1), draw(2)), fps=2.0)), ""),
    ]
    write_pairs(pairs, tmp_path / "own" / "pairs.parquet")
    assert command("--input", tmp_path / "own", "--out", tmp_path / "a") == 0
    assert records(tmp_path / "a") == pairs
    rows = [{"query": f"q{i}", "image": {"bytes": draw(i), "path": None}} for i in range(5)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    columns = ["--column", "query.text=query", "target.images=image"]
    assert command("--input", tmp_path / "saved", "--out", tmp_path / "b", *columns) == 0
    assert [record.target.images for record in records(tmp_path / "b")] == [(draw(i),) for i in range(5)]
