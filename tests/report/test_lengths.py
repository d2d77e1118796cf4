# SPDX-License-Identifier: Apache-2.0
"""Which rows are looked at, and lengths against the limits of a recipe."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.data.table import PairTable
from embedrl_verl.errors import DataError
from embedrl_verl.report.lengths import LengthMeter
from embedrl_verl.report.recipe import RecipeLimits, recipe_limits
from embedrl_verl.report.rows import choose, rows_by_source, rows_with_ids
from embedrl_verl.report.stats import summaries


def table(path: Path, sources: list[str | None]) -> PairTable:
    """A file of text pairs `ROW`."""
    item = {"text": "t"}
    rows = [
        {"pair_id": str(row), "data_source": name, "query": item, "target": item} for row, name in enumerate(sources)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path / "a.parquet", row_group_size=7)
    return PairTable([path / "a.parquet"])


def test_every_source_is_shown_and_shares_follow_sizes(tmp_path: Path) -> None:
    found = table(tmp_path, ["large"] * 300 + [None] * 30 + ["tiny"])
    sizes = {name: len(rows) for name, rows in rows_by_source(found).items()}
    assert list(sizes.items()) == [("(no source)", 30), ("large", 300), ("tiny", 1)]
    names = found.column("data_source").to_pylist()
    assert Counter(names[row] for row in choose(found, 34)) == {"large": 30, None: 3, "tiny": 1}
    assert [len(choose(found, limit)) for limit in (1, 2, 5, 330)] == [1, 2, 5, 330]
    assert choose(found, 1000) == list(range(331))


def test_choice_is_even_or_drawn_by_the_seed(tmp_path: Path) -> None:
    found = table(tmp_path, ["s"] * 101)
    assert choose(found, 5) == [0, 25, 50, 75, 100]
    assert choose(found, 20, seed=1) == choose(found, 20, seed=1) != choose(found, 20, seed=2)
    assert len(set(choose(found, 20, seed=1))) == 20
    assert rows_with_ids(found, ["8", "0"]) == [0, 8]
    with pytest.raises(DataError, match="'nobody'"):
        rows_with_ids(found, ["1", "nobody"])
    with pytest.raises(DataError, match="no rows in .*a.parquet"):
        choose(table(tmp_path, []), 3)


def test_percentiles_are_lengths_that_rows_have() -> None:
    meter: Any = LengthMeter(RecipeLimits(max_prompt_length=95), None)  # type: ignore[arg-type]
    counts = array("i", range(100, 0, -1))
    tokens: Any = {("b", "text", "query"): array("i", [3, 1, 2]), ("a", "prompt", "target"): counts}
    tokens |= {("a", "prompt", "query"): array("i", [7])}
    single, many, few = summaries(tokens, meter)
    assert many == {
        **{"source": "a", "measure": "prompt", "side": "target", "rows": 100, "mean": 50.5, "max": 100},
        **{"p50": 50, "p90": 90, "p99": 99, "limit": 95, "over": 5, "share_over": 0.05},
    }
    assert [few[name] for name in ("source", "p50", "p90", "p99")] == ["b", 2, 3, 3]
    assert [single[name] for name in ("side", "p50", "p99")] == ["query", 7, 7]


def test_limits_are_those_of_the_recipe_its_overrides_and_named_options() -> None:
    assert recipe_limits(["trainer.nnodes=1"], {}) == RecipeLimits()
    overrides = ["data.max_prompt_length=99", "data.embedrl.max_frames=3", "embedrl.evidence.max_items=2"]
    limits = recipe_limits(overrides, {"max_frames": 5, "media_root": "m"})
    assert (limits.max_prompt_length, limits.data.max_frames, limits.evidence.max_items) == (99, 5, 2)
    assert limits.media_root == "m"
