# SPDX-License-Identifier: Apache-2.0
"""A user's own rows: column maps, the command, and what is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_preprocess.generic import Generic
from embedrl_verl.convert.column_map import column_map, load_column_map
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import RawRow, RowError, Shard
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError
from tests.convert.conftest import Draw, records, write_lines

ROOT = Path(__file__).resolve().parents[2]


def one(plain: dict[str, Any] | None, values: dict[str, Any], source: str = "") -> PairRecord:
    converter = Generic(source=source)
    object.__setattr__(converter, "mapping", None if plain is None else column_map(plain, "map"))
    return converter.convert(RawRow(Shard("dir/f.jsonl", source, note="fallback"), 7, values))


def command(*options: Any) -> int:
    return convert_main(Generic, "generic", ["--workers", "1", *map(str, options)])


def test_a_map_reaches_into_lists_and_structs_and_joins_columns() -> None:
    plain = {
        "data_source": {"value": "birds"},
        "instruction": "say",
        "pair_id": "id",
        "target_id": "meta.group",
        "query_id": "shot",
        "query": {
            "text": {"template": "{title}: {turns[0].value} ({year})"},
            "images": "photos",
            "kind": {"value": "page"},
        },
        "target": {"video": "frames", "fps": 2, "tcot": "thought", "instruction": {"value": "Describe."}},
        "negatives": [{"text": "wrong"}, {"images": "bad_photos"}],
    }
    values = {
        "say": "Find it.",
        "id": 12,
        "meta": {"group": "g1"},
        "shot": 7,
        "title": "Heron",
        "turns": [{"value": "where?"}],
        "year": 1999,
        "photos": ["a.png", {"bytes": b"png", "path": "name.png"}],
        "frames": ["0.jpg", "1.jpg"],
        "thought": None,
        "wrong": ["x", "", "y"],
        "bad_photos": "c.png",
    }
    assert one(plain, values) == PairRecord(
        pair_id="12",
        data_source="birds",
        instruction="Find it.",
        query=Item(text="Heron: where? (1999)", images=("a.png", b"png"), kind="page"),
        target=Item(video=Video(frames=("0.jpg", "1.jpg"), fps=2.0), instruction="Describe."),
        target_id="g1",
        query_id="7",
        negatives=(Item(text="x"), Item(text="y"), Item(images=("c.png",))),
    )


def test_a_column_with_a_dot_in_its_name_wins_over_the_path() -> None:
    plain = {"query": "a.b", "target": "a.c"}
    record = one(plain, {"a.b": "whole", "a": {"b": "part", "c": "inner"}})
    assert (record.query.text, record.target.text) == ("whole", "inner")


def test_rows_without_ids_are_numbered_and_without_source_named_after_the_input() -> None:
    record = one({"query": "q", "target": "t"}, {"q": "a", "t": "b"})
    assert (record.pair_id, record.data_source) == ("fallback:dir/f:7", "fallback")
    record = one({"query": "q", "target": "t", "data_source": "s"}, {"q": "a", "t": "b", "s": "mine"})
    assert (record.pair_id, record.data_source) == ("mine:dir/f:7", "mine")


def test_without_a_map_a_row_is_a_pair_record() -> None:
    assert one(None, {"query": "a", "target": "b"}) == PairRecord(
        "fallback:dir/f:7", "fallback", "", Item(text="a"), Item(text="b"), ""
    )
    values = {
        "pair_id": "p",
        "data_source": "s",
        "instruction": "Find it.",
        "query": {"text": "q", "video": {"path": "c.mp4", "frames": None, "fps": 1.5}},
        "target": {"images": [{"path": "a.png"}], "video": None, "kind": None},
        "negatives": ["n", {"images": ["b.png"]}],
        "note": "ignored",
    }
    assert one(None, values) == PairRecord(
        "p",
        "s",
        "Find it.",
        Item(text="q", video=Video(path="c.mp4", fps=1.5)),
        Item(images=("a.png",)),
        "",
        (Item(text="n"), Item(images=("b.png",))),
    )


@pytest.mark.parametrize(
    ("plain", "values", "message"),
    [
        ({"query": "q", "target": "t"}, {"q": "a"}, "field t: 't' is not in the row, which has q"),
        ({"query": "q", "target": "t"}, {"q": 5, "t": "b"}, r"field q: must be a string; got 5 \(int\)"),
        ({"query": "q[1]", "target": "t"}, {"q": ["a"], "t": "b"}, r"field q\[1\]: '\[1\]' is not in q, which has"),
        ({"query": {"images": "q"}, "target": "t"}, {"q": [7], "t": "b"}, r"field q\[0\]: must be a path, the bytes"),
        ({"query": {"video": "q"}, "target": "t"}, {"q": [], "t": "b"}, "field q: has no frames"),
        ({"query": {"video": "q", "fps": "f"}, "target": "t"}, {"q": "v", "f": "2", "t": "b"}, "field f: must be a nu"),
        ({"query": {"video": "q", "fps": "f"}, "target": "t"}, {"q": "v", "f": -1, "t": "b"}, "field q: video.fps"),
        (
            {"query": {"text": "q", "kind": "k"}, "target": "t"},
            {"q": "a", "k": "x", "t": "b"},
            "field query: kind must",
        ),
        (
            {"query": "q", "target": "t", "negatives": {"text": "n", "images": "m"}},
            {"q": "a", "t": "b", "n": ["x"], "m": ["y", "z"]},
            "must be equally long; got n 1, m 2",
        ),
        (None, {"query": "a"}, "field target: the column is missing; the row has query"),
        (None, {"query": "a", "target": 5}, "field target: must be a text or an object; got 5"),
        (None, {"query": {"txt": "a"}, "target": "b"}, r"field query\.txt: unknown field; known are text, images"),
        (None, {"query": "a", "target": "b", "pair_id": []}, r"field pair_id: must be a string; got \[\]"),
        (None, {"query": "a", "target": "b", "negatives": "n"}, "field negatives: must be a list; got 'n'"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused_by_its_column(
    plain: dict[str, Any] | None, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        one(plain, values)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"query": "q"}, "map: target is missing; a pair needs both sides"),
        ({"query": "q", "target": "t", "txt": "x"}, "map: unknown key 'txt'; known are pair_id"),
        ({"query": {"picture": "q"}, "target": "t"}, "map: query: unknown key 'picture'; known are text, images"),
        ({"query": {"text": 5}, "target": "t"}, r"map: query\.text: must be a column, \{value: \.\.\.\}"),
        ({"query": {"text": {"values": 5}}, "target": "t"}, r"map: query\.text: must be a column"),
        ({"query": [], "target": "t"}, "map: query: must be a column, or a mapping of"),
    ],
)
def test_a_wrong_map_is_refused_before_anything_is_read(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        column_map(plain, "map")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{year", r"got '\{year': expected '\}'"),
        ("a } b", "got 'a } b': Single '}'"),
        ("{q!}", "got '{q!}': "),
        ("{q} {}", "got '{q} {}', where a column's name is empty"),
        ("{ }", "where a column's name is empty"),
        ("{0}", "where '0' is a number"),
        ("{0[1].a}", r"where '0\[1\]\.a' is a number"),
        ("{year:04d} {q}", "leave out ':04d'"),
        ("{q!r:>9}", "leave out '!r:>9'"),
    ],
)
def test_a_template_of_more_than_columns_is_refused_with_the_map(template: str, message: str) -> None:
    plain = {"query": {"text": {"template": template}}, "target": "t", "negatives": {"text": "n"}}
    with pytest.raises(ConfigError, match=r"map: query\.text: a template is words and columns in braces.*" + message):
        column_map(plain, "map")
    plain = {"query": "q", "target": "t", "negatives": {"text": {"template": template}}}
    with pytest.raises(ConfigError, match=r"map: negatives\[0\]\.text: a template is"):
        column_map(plain, "map")
    with pytest.raises(ConfigError, match="map: instruction: a template is"):
        column_map({"query": "q", "target": "t", "instruction": {"template": template}}, "map")


def test_a_template_may_hold_braces_and_columns_that_end_in_digits() -> None:
    plain = {"query": {"text": {"template": "{{{q1}}} {2nd} {q[0]}"}}, "target": "t"}
    assert one(plain, {"q1": "a", "2nd": 2, "q": ["b"], "t": "c"}).query.text == "{a} 2 b"


def test_a_wrong_template_ends_the_command_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "f.jsonl", [{"q": "a", "t": "b", "year": 7}])
    file = tmp_path / "map.yaml"
    for template in ("{year:04d} {}", "{year"):
        file.write_text(f'query: {{text: {{template: "{template}"}}}}\ntarget: t\n')
        assert command("--input", source, "--out", tmp_path / "out", "--columns", file) == 2
        said = capsys.readouterr().err
        assert "map.yaml: query.text: a template is words and columns in braces, as '{place}, {year}'" in said
        assert template in said
    assert not (tmp_path / "out").exists()


def test_a_constant_rate_of_the_command_line_is_a_number(tmp_path: Path) -> None:
    columns = load_column_map(None, ["query.video=v", "target=t"], ["query.fps=2"])
    assert columns is not None
    assert columns == column_map({"query": {"video": "v", "fps": 2}, "target": {"text": "t"}}, "map")
    assert one({"query": {"video": "v", "fps": 2}, "target": "t"}, {"v": "c.mp4", "t": "b"}).query.video == Video(
        path="c.mp4", fps=2.0
    )
    for text in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=rf"query\.fps: a constant must be a positive number.*got '{text}'"):
            load_column_map(None, ["query.video=v", "target=t"], [f"query.fps={text}"])
    for value in (True, 0, [1, 2], {"value": False}, {"value": [2]}):
        with pytest.raises(ConfigError, match=r"map: negatives\[0\]\.fps: (a constant )?must be"):
            column_map({"query": "q", "target": "t", "negatives": {"video": "v", "fps": value}}, "map")


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"query": {"text": {"value": 5}}, "target": "t"}, "field query.text: must be a string; got 5"),
        ({"query": "q", "target": {"images": {"value": [7]}}}, r"field target\.images\[0\]: must be a path"),
        ({"query": "q", "target": "t", "instruction": {"value": ["x"]}}, "field instruction: must be a string"),
        ({"query": "q", "target": {"video": "v"}}, r"field v\.fps: must be a number; got '2'"),
    ],
)
def test_what_is_no_column_is_named_by_its_place(plain: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        one(plain, {"q": "a", "t": "b", "v": {"path": "c.mp4", "fps": "2"}})


def test_the_command_line_writes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("query: q\ntarget: {text: t}\n")
    columns = load_column_map(str(file), ["target.text=other", "query.images=photo"], ["instruction=Find = it."])
    assert columns is not None
    assert columns.as_plain() == {
        "instruction": {"value": "Find = it."},
        "query.text": "q",
        "query.images": "photo",
        "target.text": "other",
    }
    assert load_column_map(None) is None
    for text in ("query", "=x", "query.text="):
        with pytest.raises(ConfigError, match=r"--column takes KEY=\.\.\."):
            load_column_map(None, [text])
    file.write_text("query: [")
    with pytest.raises(ConfigError, match=r"map\.yaml: not a readable column map"):
        load_column_map(str(file))


def test_one_command_from_jsonl_to_pairs(tmp_path: Path, draw: Draw) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(draw(1))
    source = write_lines(tmp_path / "in" / "My Birds.jsonl", [{"q": "what?", "a": "heron", "i": "a.png"}] * 3)
    script = [sys.executable, str(ROOT / "data_preprocess" / "generic.py"), "--input", str(source), "--workers", "1"]
    options = [
        "--column",
        "query.text=q",
        "--column",
        "query.images=i",
        "--column",
        "target.text=a",
        "--media",
        "files",
    ]
    options += ["--licence", "CC0", "--out", str(tmp_path / "out")]
    done = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "my_birds" in done.stdout
    assert f"3 pairs in 1 file(s): {tmp_path / 'out'} (media root {tmp_path / 'out' / 'media'})" in done.stdout
    (first, *_) = records(tmp_path / "out")
    assert (first.pair_id, first.data_source, first.query.text) == ("my_birds:My Birds:0", "my_birds", "what?")


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "f.jsonl", [{"query": "a", "target": "b"}, {"query": "a"}])
    given = ("--input", source, "--out", tmp_path / "out")
    assert command(*given) == 3
    assert "1 of 2 rows cannot be used, over the limit of 1.00%" in capsys.readouterr().err
    assert command(*given, "--max-bad-share", "0.5") == 3  # the good row is there
    assert "REJECTED 1 x target: the column is missing" in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 1
    written = (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns
    assert command(*given, "--max-bad-share", "0.5") == 3
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_mtime_ns == written  # nothing is done again
    assert command(*given, "--cap", "many") == 2
    assert command(*given, "--columns", tmp_path / "none.yaml") == 2
    assert command("--input", tmp_path / "gone", "--out", tmp_path / "else") == 3
    clean = write_lines(tmp_path / "clean.jsonl", [{"query": "a", "target": "b"}])
    assert command("--input", clean, "--out", tmp_path / "clean") == 0
    with pytest.raises(SystemExit, match="2"):
        command("--input", clean)


def test_our_own_files_and_folders_of_datasets_are_read(tmp_path: Path, draw: Draw) -> None:
    pairs = [
        PairRecord("p0", "s", "Find it.", Item(text="q"), Item(images=(draw(0),)), "id", (Item(text="n"),)),
        PairRecord("p1", "r", "", Item(text="q"), Item(video=Video(frames=(draw(1), draw(2)), fps=2.0)), ""),
    ]
    write_pairs(pairs, tmp_path / "own" / "pairs.parquet")
    assert command("--input", tmp_path / "own", "--out", tmp_path / "a") == 0
    assert records(tmp_path / "a") == pairs
    datasets = pytest.importorskip("datasets")
    rows = [{"query": f"q{i}", "image": {"bytes": draw(i), "path": None}} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert command("--input", tmp_path / "saved", "--out", tmp_path / "b", "--column", "query.text=query",
                   "--column", "target.images=image") == 0  # fmt: skip
    assert [record.target.images for record in records(tmp_path / "b")] == [(draw(i),) for i in range(5)]


def test_the_card_holds_the_map(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "f.jsonl", [{"q": "a", "t": "b"}])
    assert command("--input", source, "--out", tmp_path / "out", "--column", "query=q", "--column", "target=t") == 0
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["build"]["settings"]["columns.query.text"] == "q"
    assert command("--input", source, "--out", tmp_path / "out", "--column", "query=t", "--column", "target=t") == 2
