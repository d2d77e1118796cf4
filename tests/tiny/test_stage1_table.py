# SPDX-License-Identifier: Apache-2.0
"""The stage 1 table: last validation of both ways, paired gains; what is missing or unequal is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes.tiny_digits.stage1_table import main, table

from embedrl_verl.errors import DataError


def write(folder: Path, way: str, scores: list[tuple[int, float]]) -> None:
    (folder / way).mkdir(parents=True, exist_ok=True)
    lines = [{"step": 1, "data": {"loss": 3.0}}]
    lines += [
        {"step": s, "data": {"val-core/a/hit@1": v, "val-core/all/hit@1": v, "val-core/a/ndcg@5": 1}} for s, v in scores
    ]
    (folder / way / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_last_validation_counts_and_gains_are_paired(tmp_path, capsys):
    for seed, (a, b) in enumerate([(0.8, 0.5), (0.9, 0.5), (0.7, 0.3)]):
        write(tmp_path / str(seed), "with_tcot", [(5, 0.1), (10, a)])
        write(tmp_path / str(seed), "without", [(5, 0.2), (10, b)])
    assert "| all | 0.800 | 0.500 | +0.300 |" in table([tmp_path / "0"])
    main([*(x for s in "012" for x in ("--run", str(tmp_path / s))), "--out", str(tmp_path / "t.md")])
    printed = capsys.readouterr().out
    assert "| all | 0.800 | 0.433 | +0.367 (+0.223 to +0.510) |" in printed
    assert printed.strip() in (tmp_path / "t.md").read_text()


def test_unequal_or_missing_runs_are_refused(tmp_path):
    write(tmp_path, "with_tcot", [(10, 0.8)])
    with pytest.raises(DataError, match="without/metrics.jsonl is missing"):
        table([tmp_path])
    write(tmp_path, "without", [])
    with pytest.raises(DataError, match="has no validation"):
        table([tmp_path])
    write(tmp_path, "without", [(9, 0.8)])
    with pytest.raises(DataError, match="must have as many updates"):
        table([tmp_path])
