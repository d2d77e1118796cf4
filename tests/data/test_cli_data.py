# SPDX-License-Identifier: Apache-2.0
import argparse
import subprocess
import sys
import weakref
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl import cli_data
from embedrl_verl.data import inspection
from embedrl_verl.data.parquet import write_pairs
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ConfigError
from embedrl_verl.tiny.models import build_tiny_model
from tests.data.clips import write_clip


def check(*arguments):
    """Exit code of `embedrl data check ARGUMENTS`."""
    parser = argparse.ArgumentParser()
    cli_data.add_parser(parser.add_subparsers(dest="command"))
    return cli_data.run(parser.parse_args(["data", "check", *map(str, arguments)]))


def test_sound_file_gives_a_table_and_zero(tmp_path, root, pair, capsys):
    records = [pair("a", "vqa", query=Item(images=("a.png",))), pair("b", "vqa"), pair("c", "text")]
    write_pairs(records, tmp_path / "f.parquet")
    assert check(tmp_path / "f.parquet", "--media-root", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["data", "source", "pairs", "bad", "rows", "queries", "targets", "same", "kinds"],
        ["text", "1", "0", "1", "1", "0.0%", "query_text", ">", "target_text", "(1)"],
        [
            *("vqa", "2", "0", "2", "2", "0.0%"),
            *("query_image", ">", "target_text", "(1),", "query_text", ">", "target_text", "(1)"),
        ],
    ]
    assert lines[-1] == "3 pairs, 0 problem(s)"


def test_the_table_counts_queries_and_targets_and_ids_that_contradict_them_are_noted(tmp_path, root, pair, capsys):
    photo, dog = Item(images=("a.png",)), Item(text="a dog")
    captions = [
        pair("0", "captions", query=photo, target=dog),
        pair("1", "captions", query=photo, target=Item(text="a brown dog")),
        pair("2", "captions", target=Item(text="a car")),
    ]
    numbered = [pair(f"n{i}", "numbered", query=Item(text=f"q{i}"), target=dog, target_id=f"row-{i}") for i in range(3)]
    write_pairs(captions + numbered, tmp_path / "f.parquet")
    assert check(tmp_path / "f.parquet", "--media-root", root) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:6] for line in lines[1:3]}
    assert table == {"captions": ["3", "0", "2", "3", "33.3%"], "numbered": ["3", "0", "3", "3", "0.0%"]}
    (note,) = [line for line in lines if line.startswith("NOTE")]
    assert note.startswith(
        "NOTE numbered: equal content of the target stands under different target_ids (2 ids too many)"
    )


def test_a_source_of_few_negatives_is_noted(tmp_path, root, pair, capsys):
    some = [pair(f"{i}", "one", query=Item(text=f"q{i}"), target=Item(text=f"t{i}")) for i in range(4)]
    write_pairs([replace(one, query_id="0") for one in some], tmp_path / "f.parquet")
    assert check(tmp_path / "f.parquet", "--media-root", root) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE")]
    assert note.startswith("NOTE one: two of its pairs have the same query or target 100% of the time")


def test_every_bad_row_is_listed_and_the_exit_code_is_three(tmp_path, root, pair, capsys):
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "empty.mp4").write_bytes(b"")
    bad = [
        ("gone.png", "no such file in the media root"),
        ("corrupt.png", "not a readable image"),
        ("truncated.png", "not a readable image"),
        ("../outside.png", "leaves the media root"),
        ("/etc/passwd", "is absolute"),
        ("link.png", "leaves the media root"),
    ]
    records = [pair(path, query=Item(images=(path,))) for path, _ in bad]
    records += [pair("clip", target=Item(video=Video(path="empty.mp4"))), pair("ok"), pair("ok", "other")]
    records += [pair("negative", negatives=(Item(text="fine"), Item(images=("gone.png",))))]
    write_pairs(records, tmp_path / "f.parquet")
    assert check(tmp_path / "f.parquet", "--media-root", root) == 3
    out = capsys.readouterr().out
    for row, (path, reason) in enumerate(bad):
        (line,) = [line for line in out.splitlines() if f"row {row}," in line and line.startswith("BAD")]
        assert f"pair '{path}', field query: media path '{path}'" in line and reason in line
    assert "row 6, pair 'clip', field target: media path 'empty.mp4': not a readable video" in out
    assert "row 8, pair 'ok': pair_id must be unique;" in out and "row 7 has it too" in out
    assert "row 9, pair 'negative', field negatives[1]: media path 'gone.png'" in out
    assert out.splitlines()[-1] == "9 pairs, 9 problem(s)"


def test_a_clip_of_an_unknown_codec_is_a_bad_row(tmp_path, root, pair, capsys):
    good = write_clip(root / "good.mp4").read_bytes()
    (root / "strange.mp4").write_bytes(good.replace(b"avc1", b"zz99"))
    records = [pair(name, target=Item(video=Video(path=f"{name}.mp4"))) for name in ("good", "strange")]
    write_pairs(records, tmp_path / "f.parquet")
    assert check(tmp_path / "f.parquet", "--media-root", root) == 3
    out = capsys.readouterr().out
    assert "row 1, pair 'strange', field target: media path 'strange.mp4': its codec is unknown" in out
    assert out.splitlines()[-1] == "2 pairs, 1 problem(s)"


def test_malformed_rows_and_files_are_problems_too(tmp_path, pair, capsys):
    row = {"pair_id": "p", "data_source": "s", "instruction": "", "query": {"text": "q"}, "target": None}
    whole = {**row, "pair_id": "q", "target": {"text": "t"}}
    pq.write_table(pa.Table.from_pylist([row, whole]), tmp_path / "partner.parquet")
    pq.write_table(pa.Table.from_pylist([{"pair_id": "p"}]), tmp_path / "column.parquet")
    pq.write_table(pa.Table.from_pylist([{**whole, "instruction": 5}]), tmp_path / "type.parquet")
    assert check(tmp_path / "partner.parquet", tmp_path / "column.parquet", tmp_path / "type.parquet") == 3
    out = capsys.readouterr().out
    assert "partner.parquet, row 0: field target: null; a pair needs both sides" in out
    assert "column.parquet: column 'data_source' is missing" in out
    assert "type.parquet, field instruction: must be string; got int64" in out
    assert out.splitlines()[-1] == "1 pairs, 3 problem(s)"


def test_overlong_prompts_are_listed_with_their_length(tmp_path, pair, capsys):
    model = build_tiny_model(tmp_path / "model")
    write_pairs([pair("short"), pair("long", target=Item(text="word " * 500))], tmp_path / "f.parquet")
    options = ["--tokenizer", model, "--prompt-style", "compact", "--max-prompt-length"]
    assert check(tmp_path / "f.parquet", *options, 4000) == 0
    assert check(tmp_path / "f.parquet", *options, 400) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")]
    assert "row 1, pair 'long', field target: prompt has " in line and line.endswith("tokens, over the limit of 400")


def test_the_parser_is_there_without_torch():
    code = "import sys, embedrl_verl.cli_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_few_records_are_held_at_a_time(tmp_path, root, pair, monkeypatch):
    """Documents carry their pages as bytes: a file may be larger than the memory."""
    alive: weakref.WeakSet[PairRecord] = weakref.WeakSet()
    most = 0

    def scan(path):
        nonlocal most
        for row in range(300):
            record = pair(f"p{row}")
            alive.add(record)
            most = max(most, len(alive))
            yield row, record

    monkeypatch.setattr(inspection, "scan_pairs", scan)
    assert check(tmp_path / "f.parquet", "--media-root", root) == 0
    assert most <= 3 * inspection.default_threads() + 4  # one more of each thread while it hands its result over


def test_lengths_need_a_tokenizer_that_can_be_loaded(tmp_path, pair):
    write_pairs([pair("a")], tmp_path / "f.parquet")
    with pytest.raises(ConfigError, match="needs --tokenizer"):
        check(tmp_path / "f.parquet", "--max-prompt-length", 100)
    with pytest.raises(ConfigError, match="--tokenizer /nope: cannot be loaded"):
        check(tmp_path / "f.parquet", "--tokenizer", "/nope")
