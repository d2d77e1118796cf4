# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.report.lengths import LengthTable, overlong
from embedrl_verl.report.recipe import RecipeLimits, recipe_limits


def test_percentiles_are_lengths_that_rows_have() -> None:
    table = LengthTable()
    for tokens in range(100, 0, -1):
        table.add("s", {"query": {"prompt": tokens}, "target": {}})
    (found,) = table.summaries(RecipeLimits(max_prompt_length=95))
    assert found.percentiles == (50, 90, 99) and (found.rows, found.mean, found.max) == (100, 50.5, 100)
    assert (found.over, found.share_over) == (5, 0.05)
    few = LengthTable()
    for tokens in (3, 1, 2):
        few.add("s", {"query": {"text": tokens}})
    assert few.summaries(RecipeLimits())[0].percentiles == (2, 3, 3)
    single = LengthTable()
    single.add("s", {"query": {"text": 7}})
    assert single.summaries(RecipeLimits())[0].percentiles == (7, 7, 7)


def test_lengths_are_told_by_source_measure_and_side_and_together() -> None:
    table, limits = LengthTable(), RecipeLimits()
    table.add("b", {"query": {"prompt": 1, "tcot": 2}, "target": {"prompt": 3, "text": 4}})
    table.add("a", {"query": {"prompt": 5}, "target": {"prompt": 6}})
    assert [(one.source, one.measure, one.side, one.max) for one in table.summaries(limits)] == [
        ("a", "prompt", "query", 5),
        ("a", "prompt", "target", 6),
        ("b", "prompt", "query", 1),
        ("b", "prompt", "target", 3),
        ("b", "tcot", "query", 2),
        ("b", "text", "target", 4),
    ]
    first = table.totals(limits)[0]
    assert (first.measure, first.side, first.rows, first.mean) == ("prompt", "query", 2, 3.0)


def test_the_limit_itself_is_not_over() -> None:
    limits = RecipeLimits(max_prompt_length=10, max_response_length=5)
    assert overlong({"prompt": 10, "tcot": 6}, limits) == [("tcot", 6, 5)]


def test_the_defaults_are_those_of_the_recipes() -> None:
    composed = recipe_limits(["trainer.nnodes=1"])
    assert composed == RecipeLimits()
    changed = recipe_limits(["data.max_prompt_length=99", "data.embedrl.max_frames=3", "embedrl.evidence.max_items=2"])
    assert (changed.max_prompt_length, changed.data.max_frames, changed.max_evidence) == (99, 3, 2)


def test_every_override_counts_and_a_named_option_wins() -> None:
    overrides = ["data.max_prompt_length=99", "data.embedrl.max_frames=3", "embedrl.evidence.max_items=2"]
    limits = recipe_limits(overrides, {"max_frames": 5, "media_root": "m"})
    assert (limits.max_prompt_length, limits.data.max_frames, limits.max_evidence) == (99, 5, 2)
    assert limits.media_root == "m"
    with pytest.raises(ConfigError, match="--max-response-length must be at least 1; got 0"):
        recipe_limits([], {"max_response_length": 0})
