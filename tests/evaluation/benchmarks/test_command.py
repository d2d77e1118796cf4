# SPDX-License-Identifier: Apache-2.0
"""`embedrl benchmark` with real (tiny) models: files, table, averages, and comparison with another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedrl_verl import cli
from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb
from embedrl_verl.evaluation.benchmarks.command import leaderboard, report_lines
from embedrl_verl.export.record import TrainingRecord, write_record
from recipes.tiny_digits.models import build_tiny_model
from tests.evaluation.benchmarks.world import make

LIMITS = ("image_min_tokens=4", "image_max_tokens=16", "frame_min_tokens=4", "frame_max_tokens=16")
TASKS = ["N24News", "DiDeMo", "ViDoSeek-page"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in TASKS:
        make(folder, mmeb_v2.TASKS[name])
    make(folder, uvrb.TASKS["MSRVTT"])
    build_tiny_model(folder / "embedder", seed=1)
    build_tiny_model(folder / "reasoner")
    settings = {name: int(value) for name, value in (one.split("=") for one in LIMITS)} | {"prompt_style": "compact"}
    write_record(folder / "reasoner", TrainingRecord(stage="egrl", settings={**settings, "max_response_length": 4}))
    return folder


def benchmark(world: Path, out: Path, *words: str, name: str = "mmeb_v2", tasks: str = ",".join(TASKS)) -> int:
    given = ["--embedder", str(world / "embedder"), "--data-root", str(world), "--out", str(out), "--tasks", tasks]
    limits = [f"embedrl.embedder.{one}" for one in LIMITS]
    return cli.main(["benchmark", name, *given, "--device", "cpu", *words, "--set", *limits])


def test_tasks_are_scored_plain_and_with_tcots_stamped_and_written_as_the_leaderboard_takes_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(world, tmp_path / "out", "--reasoner", str(world / "reasoner")) == 0
    printed = capsys.readouterr().out
    assert "tcot-tcot" in printed and "ATTENTION: DiDeMo: queries 3, the published set has 1004" in printed
    assert "without a vector" not in printed
    written = json.loads((tmp_path / "out" / "DiDeMo.json").read_text())
    assert {name: written["stamp"][name] for name in ("instruction_place", "hidden_state", "pixel_budget")} == {
        "instruction_place": "user turn",
        "hidden_state": "after the last norm",
        "pixel_budget": "image 4 to 16 tokens, frame 4 to 16 tokens",
    }
    made_by = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (made_by["embedder"], made_by["reasoner"], made_by["tcots"]) == ("embedder", "reasoner", "written")
    board = json.loads((tmp_path / "out" / "leaderboard.tcot-plain.json").read_text())
    assert {modality: list(one) for modality, one in board["metrics"].items()} == {
        "image": ["N24News"],
        "video": ["DiDeMo"],
        "visdoc": ["ViDoSeek-page-fixed"],
    }
    assert board["metadata"]["model_name"] == "embedder" and len(board["metrics"]["image"]["N24News"]) == 26
    before = (tmp_path / "out" / "DiDeMo.json").stat().st_mtime_ns
    assert benchmark(world, tmp_path / "out", "--reasoner", str(world / "reasoner")) == 0
    assert (tmp_path / "out" / "DiDeMo.json").stat().st_mtime_ns == before


@pytest.mark.e2e
@pytest.mark.slow
def test_workers_write_the_files_of_one_process_and_no_task_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--reasoner", str(world / "reasoner")]
    assert benchmark(world, Path("alone"), *words) == 0
    alone = capsys.readouterr().out
    assert benchmark(world, Path("shared"), *words, tasks=TASKS[1]) == 0
    before = (tmp_path / "shared" / f"{TASKS[1]}.json").stat().st_mtime_ns
    capsys.readouterr()
    assert benchmark(world, Path("shared"), *words, "--workers", "2") == 0
    shared = capsys.readouterr().out
    assert f"{TASKS[2]} is done: 3 of 3" in shared and shared.splitlines()[-6:] == alone.splitlines()[-6:]
    assert (tmp_path / "shared" / f"{TASKS[1]}.json").stat().st_mtime_ns == before
    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "alone", tmp_path / "shared")
    ]
    assert files[0] == files[1] and len(files[0]) > 3 * len(TASKS)


def test_a_reasoner_that_is_not_there_is_told_first_and_leaves_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--reasoner", str(world / "reasonr")], "the Reasoner: "),
        (["--reasoner", "http://127.0.0.1:1"], "is a server: name the folder"),
    ):
        assert benchmark(world, tmp_path / "out", *words) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_another_model_of_the_same_name_or_with_other_evidence_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, str] = {"name": "uvrb", "tasks": "MSRVTT"}
    out = tmp_path / "out"
    assert benchmark(world, out, **words) == 0
    build_tiny_model(tmp_path / "embedder", seed=2)
    assert benchmark(world, out, "--embedder", str(tmp_path / "embedder"), **words) == 2
    assert "must be of this run; its weights is" in capsys.readouterr().err
    assert benchmark(world, out, "--set", "embedrl.evidence.max_items=1", **words) == 2
    assert "must be of this run; its evidence is" in capsys.readouterr().err


def test_runs_are_compared_by_task_and_those_of_another_protocol_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, words = str(tmp_path / "first"), {"name": "uvrb", "tasks": "MSRVTT"}
    assert benchmark(world, tmp_path / "first", **words) == 0
    assert not list((tmp_path / "first").glob("leaderboard*"))
    assert benchmark(world, tmp_path / "third", "--frames", "4", **words) == 0
    assert cli.main(["compare", first, first]) == 0
    assert "+0.00 too few queries" in capsys.readouterr().out
    assert cli.main(["compare", str(tmp_path / "third"), first]) == 2
    assert "must have equal stamps to be compared; frame_rule is '4 at" in capsys.readouterr().err
    assert benchmark(world, tmp_path / "fourth", "--limit", "2", **words) == 0
    assert cli.main(["compare", first, str(tmp_path / "fourth")]) == 2
    assert "queries is '3 of 1000' and '2 of 1000'" in capsys.readouterr().err
    assert benchmark(world, tmp_path / "fifth", name="own", tasks="MSRVTT") == 2
    assert "--tables gives the tasks of mmeb_v3 and own" in capsys.readouterr().err
    both = ["--reasoner", "a", "--tcots", "b"]
    assert benchmark(world, tmp_path / "fifth", *both, **words) == 2
    assert "name one of the two" in capsys.readouterr().err
    assert benchmark(world, tmp_path / "fifth", "--tcots", "b", **words) == 2
    assert "data.embedrl.family must say whose boxes the T-CoTs have" in capsys.readouterr().err


def test_what_failed_and_what_ties_would_have_given_stand_under_the_table() -> None:
    cell = {"score": 0.5, "optimistic": 0.75, "failed": {"query": 1, "candidate": 2}, "problems": ["query 3: no file"]}
    stamp = {"candidates": "local", "queries": "1000 of 1000", "candidate_count": "24 of 24"}
    files = {"N24News": {"metric": "hit@1", "stamp": stamp, "cells": {"plain-plain": cell | {"metrics": {}}}}}
    report = {"plain-plain": {"tasks": {"N24News": 50.0}, "averages": {}}}
    lines = report_lines(files, report)
    assert lines[1].split() == ["N24News", "hit@1", "local", "50.00"]
    assert lines[2:] == [
        "ATTENTION: N24News, plain-plain: 1 query and 2 candidate items without a vector, counted as misses; once "
        "mended, --retry-failed computes the task again:",
        "  query 3: no file",
        "N24News, plain-plain: 75.00 if ties counted for the model",
    ]
    assert leaderboard(files, "tcot-tcot", "m")["metrics"] == {"image": {}, "video": {}, "visdoc": {}}
