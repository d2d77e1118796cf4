# SPDX-License-Identifier: Apache-2.0
"""Rewards are compared seed by seed, and a number stands only where it was logged."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from recipes.tiny_digits.reward_table import COLORS, compare, draw, main, table

from embedrl_verl.errors import ConfigError, DataError
from recipes.tiny_digits import reward_table
from recipes.tiny_digits.summary import Run


def write_run(folder: Path, seed: int, after: float, *, judge: bool = False) -> Path:
    """A run of 20 steps whose reward rises from 0 to 0.95; with a judge its hit rate too."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(20):
        data = {"embedrl/reward/mean": step / 20, "embedrl/hit@1/mean": 0.5}
        if judge:
            data |= {"judge/hit_rate/mean": 0.7, "judge/blind_rate/mean": 0.6, "judge/unknown_rate": 0.25}
        rows.append(json.dumps({"step": step + 1, "data": data}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    values = {"raw": 0.5, "before": 0.4, "after": after, "truth": 1.0}
    views = {
        name: {"hit1": {"all": hit}, "ndcg5": {"all": hit}, "quality": None, "failed_rows": 0}
        for name, hit in values.items()
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


def load(folders: dict[str, list[Path]]) -> dict[str, list[Run]]:
    return {name: [Run.load(folder) for folder in found] for name, found in folders.items()}


def arguments(folders: dict[str, list[Path]]) -> list[str]:
    return [part for name, found in folders.items() for part in ("--runs", f"{name}={','.join(map(str, found))}")]


def test_differences_are_paired_by_seed(folders: dict[str, list[Path]]) -> None:
    rows = compare(load(folders))
    gap = rows["paper"]["difference"]
    assert gap["mean"] == pytest.approx(0.06)
    assert gap["low"] > 0, "the seeds' spread must not count"
    assert rows["no_judge"]["difference"]["mean"] == 0


def test_arrows_stand_only_where_the_metric_was_logged(folders: dict[str, list[Path]]) -> None:
    first, second = (line.split("|")[1:-1] for line in table(compare(load(folders))).splitlines()[2:])
    assert [cell.strip() for cell in first][4:] == ["0.025 → 0.925", "", "", ""]
    assert [cell.strip() for cell in second][4:] == ["0.025 → 0.925", "0.700 → 0.700", "0.600", "0.250"]
    assert first[3].strip() == ""
    assert second[3].strip().startswith("+0.060 (+0.0")


def test_one_reward_other_seeds_and_a_seed_twice_are_refused(folders: dict[str, list[Path]]) -> None:
    runs = load(folders)
    one, two = runs["no_judge"], runs["paper"]
    twice = [one[0], one[0]]
    for bad in ({"a": one}, {"a": one, "b": two[:2]}, {"a": one, "b": two[::-1]}, {"a": twice, "b": twice}):
        with pytest.raises(ConfigError, match="--runs must name two or more rewards"):
            compare(bad)


def test_every_reward_is_drawn_and_the_judge_only_if_there_was_one(
    folders: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(reward_table, "Figure", lambda **kwargs: drawn.append(Figure(**kwargs)) or drawn[-1])
    runs = load(folders)
    draw(runs, tmp_path / "with.png")
    hit, judged, bars = drawn[0].axes
    assert [line.get_label() for line in hit.lines] == ["no_judge", "paper"]
    assert [line.get_linestyle() for line in judged.lines] == ["-", "--"]
    assert len(bars.patches) == 2
    draw({str(i): runs["no_judge"] for i in range(len(COLORS))}, tmp_path / "without.png")
    hit, bars = drawn[1].axes
    assert len({line.get_color() for line in hit.lines}) == len(bars.patches) == len(COLORS)
    with pytest.raises(ConfigError, match="at most 10 rewards"):
        draw({str(i): runs["no_judge"] for i in range(len(COLORS) + 1)}, tmp_path / "many.png")


def test_the_command_writes_what_it_says(
    folders: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments(folders), "--out", str(tmp_path / "out")])
    assert set(json.loads((tmp_path / "out" / "rewards.json").read_text())) == set(folders)
    assert (tmp_path / "out" / "table.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bad", ["paper", "paper=", "=x"])
def test_a_mistake_names_the_argument(bad: str, folders: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--runs must be NAME=DIR"):
        main(["--runs", bad, "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="each name once"):
        main([*arguments(folders), *arguments(folders), "--out", str(tmp_path)])
    with pytest.raises(DataError, match="--runs paper=none: a run folder must hold"):
        main(["--runs", "paper=none", "--out", str(tmp_path)])
