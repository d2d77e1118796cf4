# SPDX-License-Identifier: Apache-2.0
"""Which rows are looked at, and lengths against the limits of a recipe."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.table import PairTable
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import DataError
from embedrl_verl.report.lengths import LengthMeter
from embedrl_verl.report.recipe import RecipeLimits, recipe_limits
from embedrl_verl.report.rows import choose, rows_with_ids
from embedrl_verl.report.stats import summaries


def test_every_source_is_shown_and_shares_follow_sizes(tmp_path: Path) -> None:
    names = ["large"] * 300 + ["small"] * 30 + ["tiny"]
    pairs = [PairRecord(str(row), name, "", Item("q"), Item("t")) for row, name in enumerate(names)]
    write_pairs(pairs, tmp_path / "a.parquet")
    table = PairTable([tmp_path / "a.parquet"])
    assert Counter(names[row] for row in choose(table, 34)) == {"large": 30, "small": 3, "tiny": 1}
    assert choose(table, 7) == [0, 75, 150, 224, 299, 300, 330] and choose(table, 1000) == list(range(331))
    assert [len(choose(table, limit, seed)) for limit in (1, 2, 330) for seed in (None, 1)] == [1, 1, 2, 2, 330, 330]
    assert choose(table, 20, seed=1) == choose(table, 20, seed=1) != choose(table, 20, seed=2)
    assert rows_with_ids(table, ["8", "0"]) == [0, 8]
    write_pairs([], tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no rows in .*b.parquet"):
        choose(PairTable([tmp_path / "b.parquet"]), 3)


def test_percentiles_are_lengths_that_rows_have() -> None:
    meter: Any = LengthMeter(RecipeLimits(max_prompt_length=95), None)  # type: ignore[arg-type]
    tokens: Any = {("b", "text", "query"): array("i", [3, 1, 2])}
    tokens["a", "prompt", "target"] = array("i", range(100, 0, -1))
    many, few = summaries(tokens, meter)
    assert many == {
        **{"source": "a", "measure": "prompt", "side": "target", "rows": 100, "mean": 50.5, "max": 100},
        **{"p50": 50, "p90": 90, "p99": 99, "limit": 95, "over": 5, "share_over": 0.05},
    }
    assert [few[name] for name in ("source", "p50", "p90", "p99", "limit")] == ["b", 2, 3, 3, 480]


def test_limits_are_those_of_the_recipe_its_overrides_and_named_options() -> None:
    assert recipe_limits(["trainer.nnodes=1"], {}) == RecipeLimits()
    overrides = ["data.max_prompt_length=99", "data.embedrl.max_frames=3", "embedrl.evidence.max_items=2"]
    limits = recipe_limits(overrides, {"max_frames": 5, "media_root": "m"})
    assert (limits.max_prompt_length, limits.data.max_frames, limits.evidence.max_items) == (99, 5, 2)
    assert limits.media_root == "m"
