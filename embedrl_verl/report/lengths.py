# SPDX-License-Identifier: Apache-2.0
"""Lengths of records in tokens, and the recipe's limit of each.

Three a side: the prompt with its media, counted with the code that the rollout runs (a pair over the limit is left out
of RL); the T-CoT with its end token (a longer one cannot be written by the policy); the side's own text (the Embedder's
input is cut there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedrl_verl.data.schema import SIDES, Side
from embedrl_verl.data.table import LocatedPair
from embedrl_verl.report.recipe import RecipeLimits

if TYPE_CHECKING:  # imports verl
    from embedrl_verl.data.lengths import PromptMeter

Measure: TypeAlias = Literal["prompt", "tcot", "text"]
Lengths: TypeAlias = dict[tuple[Measure, Side], int]


@dataclass(frozen=True)
class LengthMeter:
    """Counts the lengths of records. Safe to call from several threads."""

    limits: RecipeLimits
    prompts: PromptMeter

    @classmethod
    def from_pretrained(cls, path: str, limits: RecipeLimits) -> LengthMeter:
        from embedrl_verl.data.lengths import PromptMeter  # imports verl

        return cls(limits, PromptMeter.from_pretrained(path, limits.data.family))

    def limit(self, measure: Measure) -> int:
        of = self.limits
        return {"prompt": of.max_prompt_length, "tcot": of.max_response_length, "text": of.max_text_tokens}[measure]

    def measure(self, pair: LocatedPair, media_root: str | None) -> Lengths:
        """A side without T-CoT or text has no length of it. The MediaError of a medium names file, row and field."""
        from embedrl_verl.data.inspection import PairInspector  # imports torch

        inspector = PairInspector(self.limits.data, self.prompts.family, media_root, self.prompts)
        prompts = inspector.inspect(pair).tokens
        lengths: Lengths = {}
        for side in SIDES:
            item = pair.record.item(side)
            lengths["prompt", side] = prompts[side] or 0
            if item.tcot.strip():
                lengths["tcot", side] = self._count(item.tcot) + 1
            if item.text.strip():
                lengths["text", side] = self._count(item.text)
        return lengths

    def _count(self, text: str) -> int:
        return len(self.prompts.tokenizer(text, add_special_tokens=False)["input_ids"])
