# SPDX-License-Identifier: Apache-2.0
"""What an annotation cost and gave: counts, tokens and money, for the terminal and the data card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedrl_verl.annotate.assemble import PartCounts
from embedrl_verl.errors import ConfigError


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of prompts and of replies, in any currency; None: not told."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        if any(price is not None and price < 0 for price in (self.prompt, self.completion)):
            raise ConfigError(f"prices must be 0 or more; got {self}")

    def cost(self, counts: Mapping[str, int]) -> float | None:
        """Of the tokens counted; None without any price."""
        if self.prompt is None and self.completion is None:
            return None
        prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
        return ((self.prompt or 0.0) * prompt + (self.completion or 0.0) * completion) / 1e6


def summary(counts: PartCounts, prices: Prices) -> dict[str, Any]:
    """The counts as JSON values in a fixed order, for the data card."""
    cost = prices.cost(counts.totals)
    return {
        **dict(sorted(counts.totals.items())),
        **({"cost": round(cost, 6)} if cost is not None else {}),
        "refused_replies": _by_count(counts.problems),
        "evidence_notes": _by_count(counts.notes),
        "by_source": {source: dict(sorted(found.items())) for source, found in sorted(counts.sources.items())},
    }


def lines(counts: PartCounts, prices: Prices) -> list[str]:
    """The report for the terminal."""
    totals = counts.totals
    width = max([len("data source"), *map(len, counts.sources)])
    names = ("pairs", "sides_with_tcot", "sides_failed", "sides_asked_again", "sides_with_gold")
    tokens = ("prompt_tokens", "completion_tokens")
    heads = ("pairs", "T-CoTs", "failed", "asked again", "gold told", "prompt tokens", "reply tokens")
    table = [f"{'data source':{width}}  " + "  ".join(f"{head:>13}" for head in heads)]
    for source, found in [*sorted(counts.sources.items()), ("all", totals)]:
        table.append(f"{source:{width}}  " + "  ".join(f"{found.get(name, 0):>13,}" for name in (*names, *tokens)))
    cost = prices.cost(totals)
    if cost is not None:
        table.append(f"cost: {cost:,.4f}")
    if totals["replies_without_usage"]:
        table.append(
            f"{totals['replies_without_usage']:,} replies came without token counts; tokens are those of the rest"
        )
    for title, found in (("refused replies", counts.problems), ("evidence that was let through", counts.notes)):
        table += [f"{title}: {count:,} x {rule}" for rule, count in found.most_common(8)]
    if totals["rejected_rows"]:
        table.append(f"{totals['rejected_rows']:,} rows cannot be used, see rejected.jsonl")
    return table


def _by_count(found: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
