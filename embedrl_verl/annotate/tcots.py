# SPDX-License-Identifier: Apache-2.0
"""The questions of `embedrl data annotate`: a T-CoT for each side of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedrl_verl.annotate.answers import Entry
from embedrl_verl.annotate.backends import Reply, Sampling
from embedrl_verl.annotate.prompts import Prompt, TcotPrompts, again, digest, gold_answer_of
from embedrl_verl.annotate.questions import DrawSettings, Question, is_in_share
from embedrl_verl.annotate.replies import LEVELS, EvidenceLevel, check_tcot
from embedrl_verl.data.schema import SIDES, PairRecord, Side
from embedrl_verl.tcot.prompts import style_words

REASK_MODES = ("explain", "resample")


@dataclass(frozen=True)
class TcotSettings(DrawSettings):
    """What changes the answers, beside the questions' wording (`TcotPrompts`) and the model."""

    sides: tuple[Side, ...] = SIDES
    overwrite: bool = False
    reask: str = "explain"
    top_p: float = 1.0
    evidence: EvidenceLevel = "usable"
    gold_share: float = 0.0

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "sides", bool(self.sides) and set(self.sides) <= set(SIDES), "query, target or both"
        yield from super().rules()
        yield "reask", self.reask in REASK_MODES, f"one of {', '.join(REASK_MODES)}"
        yield "top_p", 0 < self.top_p <= 1, "above 0 and at most 1"
        yield "evidence", self.evidence in LEVELS, f"one of {', '.join(LEVELS)}"
        yield "gold_share", 0 <= self.gold_share <= 1, "between 0 and 1"


@dataclass(frozen=True)
class TcotQuestions:
    """See `embedrl_verl.annotate.questions.Questions`; a question's name is its side."""

    settings: TcotSettings
    prompts: TcotPrompts

    def described(self) -> Mapping[str, Any]:
        words = digest("again.jinja", words=style_words(self.prompts.style))
        return {**asdict(self.settings), "prompts": {**asdict(self.prompts), "templates": words}}

    def names(self, record: PairRecord) -> Sequence[Side]:
        return [side for side in self.settings.sides if self.settings.overwrite or not record.item(side).tcot]

    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        settings, record, side, tries = self.settings, question.record, _side(question), question.tries
        prompt, redraw = self.prompts.prompt(record, side, self.told(record, side)), settings.reask == "resample"
        if tries and not redraw:
            prompt = again(prompt, tries[-1]["text"], tries[-1]["problems"])
        return prompt, settings.sampling(question, redraw=redraw, top_p=settings.top_p)

    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        family, level = self.prompts.family, self.settings.evidence
        problems, notes = check_tcot(reply, question.record, _side(question), prompt, family, level)
        return {"problems": problems, "notes": notes}

    def told(self, record: PairRecord, side: Side) -> str | None:
        """The answer that is told for a side. Rows are drawn by a hash of seed and pair id."""
        told = is_in_share(self.settings.gold_share, self.settings.seed, "gold", record.pair_id)
        return gold_answer_of(record, side) if told else None


def _side(question: Question) -> Side:
    return "query" if question.name == "query" else "target"
