# SPDX-License-Identifier: Apache-2.0
"""`embedrl rollouts show`: what was written before and after RL, and in training, with ranks and reward parts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedrl_verl.cli import main
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.plan.preflight import probe_batch
from embedrl_verl.rewards.dump import note_pairs, write_reward_dump
from tests.report.conftest import BOXES, Seen, tcot

pytestmark = pytest.mark.usefixtures("file")
KEYWORDS = tcot({"text_keywords": ["red bus"]}, "After.")


@pytest.fixture
def run() -> Path:
    """A run on the records of pairs.parquet: step 4 has two pairs, the evaluation three, before and after RL."""
    files = {"train_files": ["pairs.parquet"], "val_files": ["pairs.parquet"], "media_root": None}
    media = {"family": "qwen2_vl", "image_min_tokens": 4}
    note_pairs(Path("run/rl/rollouts"), files | {"embedrl": media})
    batch = probe_batch()
    parts = {"score": torch.arange(8.0), "format": torch.ones(8)}
    parts["score"][1] = torch.nan
    rows = [
        {"pair_id": ("image", "clip")[pair], "data_source": ("vqa", "videos")[pair], "num_images": 1, "num_frames": 0}
        for pair in batch.pair.tolist()
    ]
    rows = [row | {"text": tcot({"text_keywords": [str(number)]}, f"row {number}")} for number, row in enumerate(rows)]
    write_reward_dump(Path("run/rl/rollouts/4.rewards.safetensors"), batch, parts, rows=rows, function="f.py:f")
    lines = []
    for pair, source, ranks in (("words", "odd", (0, 2)), ("image", "vqa", (1, 3)), ("clip", "videos", (2, 1))):
        for view, rank in zip(("before", "after"), ranks, strict=True):
            one = {"view": view, "data_source": source, "pair_id": pair, "tcot": BOXES, "well_formed": True}
            lines += [one | {"side": "query", "rank": rank}, one | {"side": "target", "tcot": KEYWORDS}]
    lines[0] |= {"tcot": None, "failure": "the picture is gone"}
    Path("run/tcots.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path("run")


def test_before_and_after_stand_side_by_side_and_what_rl_changed_comes_first(run, capsys):
    assert main(["rollouts", "show", "run"]) == 0
    assert capsys.readouterr().out.startswith("run/rollouts.html: 3 of 3 records")
    seen = Seen((run / "rollouts.html").read_text())
    assert [one["data-source"] for one in seen.all("article")] == ["videos", "vqa", "odd"], "fixed, broken, neither"
    for said in ("rank of the target", "not retrieved", "the picture is gone", "before 1", "after 2", "After."):
        assert said in seen.characters, said
    assert main(["rollouts", "show", "run", "--limit", "1"]) == 0, "a page of ours is written anew"
    assert len(Seen((run / "rollouts.html").read_text()).all("article")) == 1


def test_of_a_step_the_best_and_the_worst_rollout_of_each_side_are_shown(run):
    assert main(["rollouts", "show", "run", "--steps", "4", "--out", "page.html"]) == 0
    seen = Seen(Path("page.html").read_text())
    assert [one["data-source"] for one in seen.all("article")] == ["vqa", "videos"]
    batch = probe_batch()
    for pair in (0, 1):
        for side in (0, 1):
            numbers = [n for n in range(8) if (batch.pair[n], batch.side[n]) == (pair, side)]
            known = [n for n in numbers if n != 1]
            assert f"row {max(known)}" in seen.characters
    assert "step 4, best of 2, rollout 1" in seen.characters and "step 4, worst of 2" in seen.characters
    for said in ("score", "7.000", "unknown", "format", "rank"):
        assert said in seen.characters, said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none"], 3, "there is no folder none; name that of a run, or of embedrl eval"),
        (["run/rl"], 3, "run/rl has no tcots.jsonl, which an evaluation writes; --steps 1,40 shows"),
        (["run", "--steps", "5"], 2, "--steps 5 names no dumped step"),
        (["run", "--steps", "x"], 2, "--steps must be a list like 1,5-10; got 'x'"),
        (["run", "--data", "gone.parquet"], 3, "gone.parquet"),
        (["run", "--out", "mine.html"], 2, "is not a page of `embedrl`; name another file with --out"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_what_is_there(words, code, message, run, capsys):
    Path("mine.html").write_text("mine")
    assert main(["rollouts", "show", *words]) == code
    assert message in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine" and not (run / "rollouts.html").exists()


def test_a_run_that_has_noted_no_pairs_needs_them_named(run, capsys):
    (run / "rl" / "rollouts" / "pairs.json").unlink()
    assert main(["rollouts", "show", "run"]) == 2
    assert "name them with --data" in capsys.readouterr().err
    assert main(["rollouts", "show", "run", "--data", "pairs.parquet"]) == 0


def test_a_tcot_may_hold_any_line_separator(run):
    file = Path("run/tcots.jsonl")
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    lines[1]["tcot"] += "a\u2028b\x85c"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert main(["rollouts", "show", "run"]) == 0


def test_one_dump_file_knows_its_pairs(run):
    assert main(["rollouts", "show", "run/rl/rollouts/4.rewards.safetensors", "--steps", "4", "--out", "p.html"]) == 0


def test_an_evaluation_in_a_runs_folder_is_of_its_own_files_and_each_view_has_its_boxes(run):
    Path("run/rl/rollouts/pairs.json").write_text('{"val_files": ["gone.parquet"], "media_root": null, "embedrl": {}}')
    prompts = {"before": {"family": "qwen2_vl"}, "after": {"family": "qwen2_5_vl", "max_response_length": 9}}
    noted = {"files": ["pairs.parquet"], "media_root": None, "prompts": prompts}
    Path("run/evaluation.json").write_text(json.dumps(noted))
    assert main(["rollouts", "show", "run"]) == 0
    assert "1000" in (said := Seen(Path("run/rollouts.html").read_text()).characters) and "pixels" in said


def test_pairs_of_one_id_are_told_apart_by_their_source(run, capsys):
    pairs = [*read_pairs("pairs.parquet")]
    write_pairs([replace(one, data_source="other") for one in pairs], "other.parquet")
    words = ["rollouts", "show", "run", "--data", "pairs.parquet", "--data"]
    assert main([*words, "other.parquet"]) == 0
    assert "other.parquet" not in Path("run/rollouts.html").read_text()
    write_pairs(pairs, "again.parquet")
    assert main([*words, "again.parquet"]) == 3
    assert "both have" in capsys.readouterr().err
    assert main(["rollouts", "show", "run", "--data", "other.parquet"]) == 3
    assert "no row has the data_source and pair_id" in capsys.readouterr().err
