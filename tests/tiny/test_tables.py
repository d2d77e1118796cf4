# SPDX-License-Identifier: Apache-2.0
"""The tables at the end of two recipes: runs are paired by seed, and a number stands only where it was logged."""

import json
from pathlib import Path

import pytest

from benchmarks import compare_table, stage1_table
from embedrl_verl.errors import ConfigError, DataError
from recipes.tiny_digits.summary import Run


def write_run(folder: Path, seed: int, after: float, *, judge: bool = False) -> Path:
    """A run of 20 steps whose reward rises from 0 to 0.95; with a judge its hit rate too."""
    folder.mkdir(parents=True)
    judged = {"judge/hit_rate/mean": 0.7, "judge/blind_rate/mean": 0.6, "judge/unknown_rate": 0.25} if judge else {}
    rows = [
        {"step": step + 1, "data": {"embedrl/reward/mean": step / 20, "embedrl/hit@1/mean": 0.5, **judged}}
        for step in range(20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    views = {
        name: {"hit1": {"all": hit}, "ndcg5": {"all": hit}, "quality": None, "failed_rows": 0}
        for name, hit in {"raw": 0.5, "before": 0.4, "after": after, "truth": 1.0}.items()
    }
    (folder / "evaluation.json").write_text(json.dumps({"seed": seed, "views": views}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, list[Path]]:
    """Seeds far apart; `paper` is 0.05, 0.06 and 0.07 better in each."""
    base = (0.3, 0.5, 0.7)
    return {
        "no_judge": [write_run(tmp_path / "n" / str(i), i, hit) for i, hit in enumerate(base)],
        "paper": [write_run(tmp_path / "p" / str(i), i, h + 0.05 + i / 100, judge=True) for i, h in enumerate(base)],
    }


def test_variants_are_paired_by_seed_and_numbers_stand_where_they_were_logged(folders, tmp_path, capsys):
    variants = [f"{name}={','.join(map(str, found))}" for name, found in folders.items()]
    compare_table.main(tmp_path / "out", variants)
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    gaps = {name: row["by_source"]["all"]["difference"] for name, row in rows.items()}
    assert gaps["paper"]["mean"] == pytest.approx(0.06) and gaps["no_judge"]["mean"] == 0
    assert gaps["paper"]["low"] > 0, "the seeds' spread must not count"
    assert gaps["raw"]["mean"] == pytest.approx(0), "0.5 in each run, as the mean of the first variant"
    text = (tmp_path / "out" / "table.md").read_text()
    first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:4])
    assert text.splitlines()[-1].startswith("| all | 0.500 | +0.060 (+0.035 to +0.085) | +0.000 (-")
    assert first[3:] == ["", "0.025 → 0.925", "", "", ""]
    assert second[4:] == ["0.025 → 0.925", "0.700 → 0.700", "0.600", "0.250"]
    assert second[3].startswith("+0.060 (+0.0") and text.strip() in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_variant_other_seeds_and_a_seed_twice_are_refused(folders: dict[str, list[Path]], tmp_path: Path) -> None:
    one, two = ([Run(folder) for folder in found] for found in folders.values())
    twice = [one[0], one[0]]
    for bad in ({"a": one}, {"a": one, "b": two[:2]}, {"a": one, "b": two[::-1]}, {"a": twice, "b": twice}):
        with pytest.raises(ConfigError, match="name 2 to 10 variants"):
            compare_table.compare(bad)
    for wrong in (["paper"], ["=x"], [f"a={folders['paper'][0]}"] * 2):
        with pytest.raises(ConfigError, match=r"must be NAME=RUN\[,RUN...\], each name once"):
            compare_table.main(tmp_path, wrong)


def test_the_last_validation_of_stage_1_counts_and_gains_are_paired(tmp_path: Path) -> None:
    def write(way: str, scores: list[tuple[int, float]]) -> None:
        way_of_run = tmp_path / way
        way_of_run.mkdir(parents=True, exist_ok=True)
        lines = [{"step": 1, "data": {"loss": 3.0}}]
        for step, hit in scores:
            core = {
                "val-core/a/hit@1": hit,
                "val-core/all/hit@1": hit,
                "val-core/a/ndcg@5": 1,
                "raw/val-core/a/hit@1": 9,
            }
            lines.append({"step": step, "data": core})
        (way_of_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    for seed, (a, b) in enumerate([(0.8, 0.5), (0.9, 0.5), (0.7, 0.3)]):
        write(f"{seed}/with_tcot", [(5, 0.1), (10, a)])
        write(f"{seed}/without", [(5, 0.2), (10, b)])
    assert "| all | 0.800 | 0.500 | +0.300 |" in stage1_table.table([tmp_path / "0"])
    text = stage1_table.table([tmp_path / seed for seed in "012"])
    assert "| all | 0.800 | 0.433 | +0.367 (+0.223 to +0.510) |" in text
    write("0/without", [(9, 0.8)])
    with pytest.raises(DataError, match="must have as many updates"):
        stage1_table.table([tmp_path / "0"])
    write("0/without", [])
    with pytest.raises(DataError, match="has no validation"):
        stage1_table.table([tmp_path / "0"])
