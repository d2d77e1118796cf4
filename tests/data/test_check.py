# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.cli import main
from embedrl_verl.data import table
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.data.writer import write_pairs
from recipes.tiny_digits.models import build_tiny_model
from tests.data.clips import write_clip

MakePair = Callable[..., PairRecord]
Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """`embedrl data check` of records: exit code, and the lines that it prints."""

    def run(records: Iterable[PairRecord], *options: object) -> tuple[int, list[str]]:
        write_pairs(list(records), tmp_path / "f.parquet")
        words = ["data", "check", tmp_path / "f.parquet", "--media-root", root, *options]
        return main(list(map(str, words))), capsys.readouterr().out.splitlines()

    return run


def test_sound_file_gives_a_table_and_zero(check: Check, pair: MakePair) -> None:
    code, lines = check([pair("a", "vqa", query=Item(images=("a.png",))), pair("b", "vqa"), pair("c", "text")])
    assert code == 0
    assert [line.split() for line in lines[:3]] == [
        ["data", "source", "pairs", "bad", "rows", "queries", "targets", "same", "kinds"],
        ["text", "1", "0", "1", "1", "0.0%", "query_text", ">", "target_text", "(1)"],
        [
            *("vqa", "2", "0", "2", "2", "0.0%"),
            *("query_image", ">", "target_text", "(1),", "query_text", ">", "target_text", "(1)"),
        ],
    ]
    assert lines[-1] == "3 pairs, 0 problem(s)"


def test_the_table_counts_queries_and_targets_and_ids_that_contradict_them_are_noted(
    check: Check, pair: MakePair
) -> None:
    photo, dog = Item(images=("a.png",)), Item(text="a dog")
    captions = [
        pair("0", "captions", query=photo, target=dog),
        pair("1", "captions", query=photo, target=Item(text="a brown dog")),
        pair("2", "captions", target=Item(text="a car")),
    ]
    numbered = [pair(f"n{i}", "numbered", query=Item(text=f"q{i}"), target=dog, target_id=f"row-{i}") for i in range(3)]
    code, lines = check(captions + numbered)
    table = {line.split()[0]: line.split()[1:6] for line in lines[1:3]}
    assert table == {"captions": ["3", "0", "2", "3", "33.3%"], "numbered": ["3", "0", "3", "3", "0.0%"]}
    (note,) = [line for line in lines if line.startswith("NOTE")]
    assert code == 0 and note.startswith(
        "NOTE numbered: equal content of the target stands under different target_ids (2 ids too many)"
    )


def test_a_source_of_few_negatives_is_noted(check: Check, pair: MakePair) -> None:
    some = [pair(f"{i}", "one", query=Item(text=f"q{i}"), target=Item(text=f"t{i}")) for i in range(4)]
    code, lines = check(replace(one, query_id="0") for one in some)
    (note,) = [line for line in lines if line.startswith("NOTE")]
    assert code == 0 and note.startswith("NOTE one: two of its pairs have the same query or target 100% of the time")


def test_every_bad_row_is_listed_and_the_exit_code_is_three(check: Check, root: Path, pair: MakePair) -> None:
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
    code, lines = check(records)
    out = "\n".join(lines)
    for row, (path, reason) in enumerate(bad):
        (line,) = [line for line in lines if f"row {row}," in line and line.startswith("BAD")]
        assert f"pair '{path}', field query: media path '{path}'" in line and reason in line
    assert "row 6, pair 'clip', field target: media path 'empty.mp4': not a readable video" in out
    assert "row 8, pair 'ok': pair_id must be unique;" in out and "row 7 has it too" in out
    assert "row 9, pair 'negative', field negatives[1]: media path 'gone.png'" in out
    assert code == 3 and lines[-1] == "9 pairs, 9 problem(s)"


def test_a_clip_of_an_unknown_codec_is_a_bad_row(check: Check, root: Path, pair: MakePair) -> None:
    good = write_clip(root / "good.mp4").read_bytes()
    (root / "strange.mp4").write_bytes(good.replace(b"avc1", b"zz99"))
    code, lines = check(pair(name, target=Item(video=Video(path=f"{name}.mp4"))) for name in ("good", "strange"))
    assert "row 1, pair 'strange', field target: media path 'strange.mp4': its codec is unknown" in "\n".join(lines)
    assert code == 3 and lines[-1] == "2 pairs, 1 problem(s)"


def test_malformed_rows_and_files_are_problems_too(check: Check, tmp_path: Path, pair: MakePair) -> None:
    row = {
        "pair_id": "p",
        "data_source": "s",
        "instruction": "",
        "query": {"text": "q"},
        "target": None,
        "target_id": "",
    }
    whole = {**row, "pair_id": "q", "target": {"text": "t"}}
    tables = {"partner": [row, whole], "column": [{"pair_id": "p"}], "type": [{**whole, "instruction": 5}]}
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    code, lines = check([pair("ok")], *(tmp_path / f"{name}.parquet" for name in (*tables, "gone")))
    out = "\n".join(lines)
    assert "partner.parquet, row 0: field target: null; a pair needs both sides" in out
    assert "column.parquet: column 'data_source' is missing" in out
    assert "type.parquet, field instruction: must be string; got int64" in out
    assert "gone.parquet" in out and code == 3 and lines[-1] == "2 pairs, 4 problem(s)"


def test_overlong_prompts_are_listed_with_their_length(check: Check, tmp_path: Path, pair: MakePair) -> None:
    records = [pair("short"), pair("long", target=Item(text="word " * 500))]
    options = ["--tokenizer", build_tiny_model(tmp_path / "model"), "--prompt-style", "compact", "--max-prompt-length"]
    assert check(records, *options, 4000)[0] == 0
    code, lines = check(records, *options, 400)
    (line,) = [line for line in lines if line.startswith("BAD")]
    assert code == 3 and line.endswith("tokens, over the limit of 400")
    assert "row 1, pair 'long', field target: prompt has " in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-prompt-length", 100), "needs --tokenizer DIR, the Reasoner's folder"),
        (("--tokenizer", "/nope"), "--tokenizer /nope: cannot be loaded"),
        (("--family", "llava"), "got 'llava'"),
        (("--image-min-tokens", 900), "data.embedrl.image_max_tokens must be at least image_min_tokens (900); got 768"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert main(["data", "check", str(tmp_path / "f.parquet"), *map(str, options)]) == 2
    assert message in capsys.readouterr().err


def test_a_few_records_are_held_at_a_time(
    check: Check, pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents carry their pages as bytes: a file may be larger than the memory."""
    write_pairs([pair(f"p{row}") for row in range(300)], tmp_path / "many.parquet")
    alive: weakref.WeakSet[PairRecord] = weakref.WeakSet()
    most = 0
    read = table.record_or_error

    def noted(*arguments: object) -> object:
        nonlocal most
        record = read(*arguments)
        alive.add(record)
        most = max(most, len(alive))
        return record

    monkeypatch.setattr(table, "record_or_error", noted)
    assert main(["data", "check", str(tmp_path / "many.parquet")]) == 0
    assert 1 < most <= 3 * default_threads() + 4  # one more of each thread while it hands its result over


def test_threads_keep_the_order_and_read_only_a_little_ahead() -> None:
    read: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    results = in_threads(lambda number: number * 2, inputs(), threads=3)
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(read) <= 5 + 2 * 3 + 1
    assert list(results) == [2 * number for number in range(5, 1000)]


def test_an_error_in_a_thread_is_not_lost() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 // number, [1, 0, 1], threads=2))
