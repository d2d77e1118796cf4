# SPDX-License-Identifier: Apache-2.0
"""`embedrl embed`: the library's vectors, no row lost or doubled, no zero vector, and failures that are told."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.platforms.forkserver import python
from tests.embedder.inputs import picture
from tests.retrieval.conftest import rows_of, words, write_corpus


def vectors(rows):
    return np.array([row["vector"] for row in rows], np.float32)


def test_vectors_and_tcots_are_those_of_the_library_in_the_order_of_the_input(embed, model, tmp_path):
    file, out = write_corpus(tmp_path / "in", 9), tmp_path / "out"
    options = ["--rows-per-part", "4", "--batch-size", "3", "--instruction", "Find it."]
    assert embed(file, out, *options, reasoner=True) == 0
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(9)] and len(list(out.glob("part-*"))) == 3
    given = [json.loads(line) for line in file.read_text().splitlines()]
    inputs = [{**one, "image": file.parent / one["image"]} if "image" in one else one for one in given]
    for one in inputs:
        del one["id"]
    wanted, tcots = model.encode_document(inputs, prompt="Find it.", return_tcots=True)
    assert ((vectors(rows) * wanted).sum(1) >= 0.999).all() and [row["tcot"] for row in rows] == tcots
    assert all(row["problem"] is None and row["evidence"] >= 0 for row in rows)


def test_pair_records_give_the_side_that_is_asked_for_and_folders_their_pictures(embed, model, tmp_path):
    records = [PairRecord(f"p{i}", "s", "Find it.", Item(f"query {i}"), Item(f"target {i}")) for i in range(3)]
    write_pairs(records, tmp_path / "pairs.parquet")
    for side, wanted in (
        ("query", model.encode_query([f"query {i}" for i in range(3)], prompt="Find it.", think="never")),
        ("target", model.encode_document([f"target {i}" for i in range(3)], think="never")),
    ):
        assert embed(tmp_path / "pairs.parquet", tmp_path / side, "--side", side) == 0
        rows = rows_of(tmp_path / side)
        assert [row["id"] for row in rows] == ["p0", "p1", "p2"] and {row["tcot"] for row in rows} == {None}
        assert np.allclose(vectors(rows), wanted, atol=1e-5)
    (tmp_path / "pictures" / "b").mkdir(parents=True)
    for i, name in enumerate(("b/1.PNG", "2.jpg", "b/0.png")):
        picture(i).save(tmp_path / "pictures" / name)
    assert embed(tmp_path / "pictures", tmp_path / "of_pictures") == 0
    assert [row["id"] for row in rows_of(tmp_path / "of_pictures")] == ["2.jpg", "b/0.png", "b/1.PNG"]


BAD = {
    '{"text": "a": ': "must be a JSON object",
    "[1]": "must be a JSON object",
    '{"txt": "a"}': "keys must be",
    '{"image": "gone.png"}': "gone.png",
    '{"image": "../x.png"}': "leaves the media root",
    '{"image": 3}': "an image must be",
    '{"image": "a\\u0000.png"}': "a",
    '{"text": ["a"]}': "text must be a text",
    '{"kind": "page"}': "empty",
    '{"kind": 3, "text": "a"}': "kind must be",
    "[" * 100_000: "must be a JSON object",
    '{"images": 3}': "images must be a list",
    '{"video": 3}': "video must be a path",
    '{"text": ""}': "empty",
    "": "must be a JSON object",
    '{"text": "\\ud800"}': "surrogate",
    '{"text": "a", "instruction": "\\udc00"}': "surrogate",
}


def test_a_row_without_a_vector_is_null_with_its_problem_and_too_many_end_with_3(embed, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("\n".join(['{"text": "fine"}', *BAD]) + "\n")
    out, share = tmp_path / "out", str(len(BAD) / (len(BAD) + 1))
    assert embed(tmp_path / "in.jsonl", out) == 3
    error = capsys.readouterr().err
    assert f"{len(BAD)} of {len(BAD) + 1} rows" in error and "--max-failed-share" in error
    assert embed(tmp_path / "in.jsonl", out, "--max-failed-share", share) == 0
    assert f"{len(BAD)} without a vector" in capsys.readouterr().out
    first, *failed = rows_of(out)
    assert first["id"] == "in.jsonl:1" and np.linalg.norm(first["vector"]) == pytest.approx(1, abs=1e-5)
    for row, why in zip(failed, BAD.values(), strict=True):
        assert row["vector"] is None and why in row["problem"], row
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["file"].rpartition(" ")[2] for line in lines] == [str(i) for i in range(2, len(BAD) + 2)]


def test_parts_that_lack_vectors_are_made_again_when_asked_and_no_others(embed, tmp_path):
    file, out = write_corpus(tmp_path / "in", 9), tmp_path / "out"
    (file.parent / "4.png").rename(file.parent / "away")
    assert embed(file, out, "--rows-per-part", "3") == 3
    first, second = (out / f"part-0000{i}.parquet" for i in (0, 1))
    stamp = first.stat().st_mtime_ns
    (file.parent / "away").rename(file.parent / "4.png")
    assert embed(file, out, "--rows-per-part", "3") == 3 and None in [row["vector"] for row in rows_of(out)]
    assert embed(file, out, "--rows-per-part", "3", "--retry-failed") == 0
    assert first.stat().st_mtime_ns == stamp < second.stat().st_mtime_ns
    assert [row["id"] for row in rows_of(out) if row["vector"]] == [f"d{i}" for i in range(9)]


def test_other_options_are_refused_and_the_same_do_nothing(embed, tmp_path, capsys):
    file, out = write_corpus(tmp_path / "in", 3), tmp_path / "out"
    assert embed(file, out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert embed(file, out) == 0 and "nothing to do" in capsys.readouterr().out
    assert embed(file, out, "--side", "query") == 2
    assert "settings.side was 'target', is 'query'" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (tmp_path / "empty.jsonl").touch()
    assert embed(tmp_path / "empty.jsonl", tmp_path / "other") == 3
    assert embed(tmp_path / "no.jsonl", tmp_path / "other") == 3 and embed(file, out, "--think", "always") == 2


@pytest.mark.slow
def test_killed_and_started_again_no_row_is_lost_or_doubled(pair, tmp_path):
    file, out = write_corpus(tmp_path / "in", 120), tmp_path / "out"
    run = [python(), "-m", "embedrl_verl.cli", "embed", str(file), "--out", str(out), "--rows-per-part", "4"]
    run += words(pair)
    kept = {}
    for count in (1, 9):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*out.glob("part-*.parquet")]) < count:
            time.sleep(0.002)
        assert process.poll() is None, "it was to be killed at its work"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept |= {path: (out / path.stem).stat().st_mtime_ns for path in out.glob("_work/part-*.json")}
    assert subprocess.call(run, stdout=subprocess.DEVNULL) == 0 and kept
    assert all((out / path.stem).stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert [row["id"] for row in rows_of(out)] == [f"d{i}" for i in range(120)]
    assert not [*out.glob("_work"), *out.glob(".*.tmp")]


def test_a_record_that_is_searched_for_by_text_keeps_the_question_of_training(tmp_path):
    from embedrl_verl.retrieval.inputs import Inputs, Reading, read_part

    write_pairs([PairRecord("p", "s", "", Item("q"), Item(video=Video(path="a.mp4")))], tmp_path / "p.parquet")
    (part,) = Inputs([str(tmp_path / "p.parquet")], 10).parts
    (row,) = read_part(part, Reading("query", media_root=str(tmp_path)))
    assert row.ask().kind == "query_text_to_video"
