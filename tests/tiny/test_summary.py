# SPDX-License-Identifier: Apache-2.0
"""The summary says what the files say, pairs the runs, and does not call a loss or a doubt an improvement."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.comparison import hit1_interval
from recipes.tiny_digits.summary import Run, main, smoothed, summarise, table

QUERIES = 40


def write_run(folder: Path, raw: int, before: int, after: int, *, rise: float = 0.5, failed: int = 0) -> Path:
    """A run of 20 steps; `raw`, `before`, `after`: hits of the source `a` (of 40), `b` always has 10 of its 20."""
    folder.mkdir()
    rows = [{"step": 0, "data": {"val-core/all/hit@1": 0.4}}]
    for step in range(1, 21):
        data = {"embedrl/reward/mean": 0.2 + rise * step / 20, "embedrl/hit@1/mean": 0.5, "timing_s/step": 4.0}
        rows.append({"step": step, "data": data | {"timing_s/reward_stage": 0.5}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quality = {"well_formed": 1.0, "format": 1.0, "digits": 0.9, "written": 0.9, "exact": 0.7, "evidence": 1.0}
    views = {}
    for name, found in {"raw": raw, "before": before, "after": after, "truth": QUERIES}.items():
        hits = {"a": [1] * found + [0] * (QUERIES - found), "b": [1] * 10 + [0] * 10}
        score = {"a": found / QUERIES, "b": 0.5, "all": (found / QUERIES + 0.5) / 2}
        views[name] = {"hit1": score, "ndcg5": score, "hits": hits, "failed_rows": failed, "problems": []}
        views[name]["quality"] = None if name == "raw" else quality
    (folder / "evaluation.json").write_text(json.dumps({"seed": 1, "views": views}))
    return folder


def test_numbers_are_those_of_the_files_and_every_source_weighs_the_same(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "one", 8, 16, 24))
    numbers = run.numbers()
    assert numbers["hit@1/after"] == pytest.approx((24 / 40 + 0.5) / 2)
    assert numbers["reward/first_tenth"] == pytest.approx(0.2 + 0.5 * 1.5 / 20), "20 steps: a tenth is two of them"
    assert numbers["reward/last_tenth"] == pytest.approx(0.2 + 0.5 * 19.5 / 20)
    assert (numbers["steps"], numbers["seconds_per_step"], numbers["reward_stage_share"]) == (20, 4.0, 0.125)
    for view in ("raw", "before", "after"):
        assert hit1_interval([run.views], view).mean == pytest.approx(numbers[f"hit@1/{view}"])


def test_one_run_has_intervals_over_queries_and_several_over_paired_runs(tmp_path: Path) -> None:
    hits = [(8, 16, 24), (20, 27, 36), (2, 11, 20)]  # far apart, but each gains 8 or 9 of 40 by RL
    runs = [Run(write_run(tmp_path / f"seed{i}", *one)) for i, one in enumerate(hits)]
    assert "bootstrap" in summarise(runs[:1])["interval"]
    assert summarise(runs[:1])["over_runs"] == {}
    result = summarise(runs)
    gain = result["hit@1_differences"]["after - before"]
    assert gain["mean"] == pytest.approx((8 + 9 + 9) / 3 / 40 / 2)
    spread = result["over_runs"]["hit@1/after"]
    assert gain["high"] - gain["low"] < 0.2 * (spread["high"] - spread["low"]), "pairing must take out the seeds"
    assert result["findings"][0].endswith(": better")


def test_a_loss_or_a_doubt_is_not_called_an_improvement_and_failed_rows_are_told(tmp_path: Path) -> None:
    worse = [Run(write_run(tmp_path / f"w{i}", 8, 30 + i, 20, rise=-0.2)) for i in range(3)]
    findings = summarise(worse)["findings"]
    assert findings[0].endswith("WORSE") and findings[1].endswith("better") and len(findings) == 5
    assert findings[3].endswith("T-CoT after RL against raw input: better in a; unclear in b")
    assert "in 0 of 3 runs" in findings[4] and "did NOT rise in w0, w1, w2" in findings[4]
    doubtful = [Run(write_run(tmp_path / f"d{i}", 8, 20, 18 + 3 * i)) for i in range(3)]
    assert "NO CLEAR DIFFERENCE" in summarise(doubtful)["findings"][0]
    lost = [Run(write_run(tmp_path / "bad", 24, 16, 8, failed=2))]
    text = table(lost, summarise(lost))
    assert re.search(r"^a +40 .* -0.200 .* WORSE +-0.400 .* WORSE$", text, re.MULTILINE)
    assert "ATTENTION: inputs without an embedding, counted as misses: {'bad': 8}" in text


def test_smoothing_keeps_steps_and_a_straight_line() -> None:
    line = {step: 2.0 * step for step in range(5, 15)}
    result = smoothed(line, 3)
    assert list(result) == list(line) and smoothed(line, 1) == line
    assert [result[step] for step in range(6, 14)] == [line[step] for step in range(6, 14)]


TABLE = """\
Held-out pairs: every query against all targets of its data source. first, last = tenth of the RL steps
       Hit@1                        NDCG@5                 reward         answers  right   s a  reward
run      raw  before  after   true     raw  before  after   first   last   before  after  step   stage
------------------------------------------------------------------------------------------------------
seed0  0.350   0.450  0.550  0.750   0.350   0.450  0.550   0.237  0.688    0.700  0.700  4.00   12.5%"""


@pytest.mark.parametrize("count", [1, 3])
def test_command_prints_a_line_a_run_and_writes_both_files(count, tmp_path, capsys):
    folders = [write_run(tmp_path / f"seed{i}", 8 + i, 16, 24 - i) for i in range(count)]
    main(folders)
    out = folders[0] if count == 1 else tmp_path
    text = capsys.readouterr().out
    starts = [line.split()[0] for line in text.splitlines() if line]
    assert all(starts.count(folder.name) == 1 for folder in folders)
    assert ("mean" in starts) == (count > 1)
    assert count > 1 or "\n".join(text.splitlines()[:5]) == TABLE
    assert set(json.loads((out / "results.json").read_text())["runs"]) == {folder.name for folder in folders}
    with Image.open(out / "curves.png") as image:
        assert image.width > 1000


def test_an_unfinished_run_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 8, 16, 24)
    with pytest.raises(ConfigError, match="different folders"):
        main([folder, folder])
    (folder / "evaluation.json").unlink()
    with pytest.raises(DataError, match="must hold evaluation.json"):
        Run(folder)
