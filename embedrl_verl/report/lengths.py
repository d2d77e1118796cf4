# SPDX-License-Identifier: Apache-2.0
"""Lengths in tokens against a recipe's limits, as counts, percentiles and shares over the limit.

Three lengths a side: the prompt with its media, counted with the code that the rollout runs (`data.max_prompt_length`;
a pair over it is left out of RL); the T-CoT with its end token (`data.max_response_length`; a longer one cannot be
written by the policy); the side's own text (`embedrl.embedder.max_text_tokens`; the Embedder's input is cut there).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedrl_verl.data.schema import SIDES, PairRecord, Side
from embedrl_verl.families import Family
from embedrl_verl.report.recipe import RecipeLimits
from embedrl_verl.report.rows import Row

if TYPE_CHECKING:  # imports verl
    from embedrl_verl.data.lengths import PromptMeter

Measure: TypeAlias = Literal["prompt", "tcot", "text"]
MEASURES: tuple[Measure, ...] = ("prompt", "tcot", "text")
PERCENTILES = (50, 90, 99)
Lengths: TypeAlias = dict[Side, dict[Measure, int]]


def limit_of(measure: Measure, limits: RecipeLimits) -> int:
    """The recipe's limit of a length, in tokens."""
    return {
        "prompt": limits.max_prompt_length,
        "tcot": limits.max_response_length,
        "text": limits.max_text_tokens,
    }[measure]


@dataclass(frozen=True)
class LengthMeter:
    """Counts the lengths of records. Safe to call from several threads.

    Attributes:
        family: of the Reasoner whose tokenizer it is; decides the template and the sizes of media.
    """

    limits: RecipeLimits
    family: Family
    tokenizer: Any
    meter: PromptMeter

    @classmethod
    def from_pretrained(cls, path: str, limits: RecipeLimits) -> LengthMeter:
        """Load tokenizer and image processor of a Reasoner; no weights."""
        from embedrl_verl.data.lengths import PromptMeter  # imports verl

        meter = PromptMeter.from_pretrained(path, limits.data.family)
        return cls(limits, meter.family, meter.tokenizer, meter)

    def measure(self, record: PairRecord, row: Row) -> Lengths:
        """Lengths of both sides; a side without T-CoT has no length of one, and one without text none of that."""
        from embedrl_verl.data.inspection import LocatedPair, PairInspector  # imports torch

        inspector = PairInspector(self.limits.data, self.family, row.media_root, self.meter)
        prompts = inspector.inspect(LocatedPair(str(row.file), row.row, record)).tokens
        lengths: Lengths = {}
        for side in SIDES:
            item, prompt = record.item(side), prompts[side]
            assert prompt is not None
            lengths[side] = {"prompt": prompt}
            if item.tcot.strip():
                lengths[side]["tcot"] = self._count(item.tcot) + 1
            if item.text.strip():
                lengths[side]["text"] = self._count(item.text)
        return lengths

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class LengthSummary:
    """One length of one side of one source; tokens. `percentiles` are lengths that rows have (nearest rank)."""

    source: str
    side: Side
    measure: Measure
    rows: int
    mean: float
    percentiles: tuple[int, ...]
    max: int
    limit: int
    over: int

    @property
    def share_over(self) -> float:
        """Share of the rows over the limit."""
        return self.over / self.rows


class LengthTable:
    """Collects lengths, 4 bytes each."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, Side, Measure], array[int]] = {}
        self.rows = 0

    def add(self, source: str, lengths: Lengths) -> None:
        """Add a record's lengths."""
        self.rows += 1
        for side, measures in lengths.items():
            for measure, tokens in measures.items():
                self._values.setdefault((source, side, measure), array("i")).append(tokens)

    def summaries(self, limits: RecipeLimits) -> list[LengthSummary]:
        """By source, then measure, then side."""
        order = {name: place for place, name in enumerate((*MEASURES, *SIDES))}
        keys = sorted(self._values, key=lambda key: (key[0], order[key[2]], order[key[1]]))
        return [_summary(*key, self._values[key], limit_of(key[2], limits)) for key in keys]

    def totals(self, limits: RecipeLimits) -> list[LengthSummary]:
        """All sources together, as source "all"."""
        merged = LengthTable()
        for (_, side, measure), values in self._values.items():
            merged._values.setdefault(("all", side, measure), array("i")).extend(values)
        return merged.summaries(limits)


def _summary(source: str, side: Side, measure: Measure, values: array[int], limit: int) -> LengthSummary:
    ordered = sorted(values)
    count = len(ordered)
    ranks = tuple(ordered[-(-count * percent // 100) - 1] for percent in PERCENTILES)
    over = sum(value > limit for value in ordered)
    return LengthSummary(source, side, measure, count, sum(ordered) / count, ranks, ordered[-1], limit, over)


def overlong(lengths: Mapping[Measure, int], limits: RecipeLimits) -> list[tuple[Measure, int, int]]:
    """(measure, tokens, limit) of a side's lengths that are over their limit."""
    return [
        (name, tokens, limit_of(name, limits)) for name, tokens in lengths.items() if tokens > limit_of(name, limits)
    ]
