# SPDX-License-Identifier: Apache-2.0
"""The relevance judge (method section 5): are the T-CoTs of a query and of its target obviously irrelevant to each
other, or in conflict, given the task?

No keeps the pair ("match"), Yes does not ("mismatch"); the judge is told to say No in doubt. What names neither, or
both, is "unknown" and never counted as an opinion; so is a pair that lacks a T-CoT. Where the server is vLLM (or the
engine), decoding is constrained to the two words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from embedrl_verl.annotate.answers import Entry
from embedrl_verl.annotate.backends import Reply, Sampling
from embedrl_verl.annotate.prompts import TEMPLATES, Prompt, digest
from embedrl_verl.annotate.questions import DrawSettings, Question
from embedrl_verl.annotate.verdict_file import Verdict
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.tcot.harmless import break_control, break_tags

QUESTION = "relevance"
NO_WORD = "names neither word, or both"


@dataclass(frozen=True)
class RelevanceStyle:
    """How the judge is asked.

    Attributes:
        answers_only: show what stands in a T-CoT's <answer>, on one line, instead of all of it.
        delimiters: names of tags that the template uses; tags of these names in a shown text are broken up.
    """

    template: str
    answers_only: bool
    delimiters: tuple[str, ...]
    yes_word: str
    no_word: str

    def prompt(self, instruction: str, query_tcot: str, target_tcot: str) -> str:
        """The question about two T-CoTs. They, and the instruction, are put in as data."""
        query, target = (parse_tcot(one).answer if self.answers_only else one for one in (query_tcot, target_tcot))
        values = {"instruction": instruction, "query": query, "target": target}
        return TEMPLATES.get_template(self.template).render({k: self._harmless(v) for k, v in values.items()})

    def _harmless(self, text: str) -> str:
        text = " ".join(text.split()) if self.answers_only else text.strip()
        return break_tags(break_control(text), self.delimiters)


STYLES = {
    "paper": RelevanceStyle("relevance_paper.jinja", False, ("query", "target"), "Yes", "No"),
    "compact": RelevanceStyle("relevance_compact.jinja", True, (), "yes", "no"),
}


def read_verdict(text: str, style: RelevanceStyle) -> Verdict:
    """What a reply says: one of the two words, whatever stands around it, and not the other."""
    words = {word.casefold() for word in re.findall(r"\w+", text)}
    says_yes, says_no = style.yes_word.casefold() in words, style.no_word.casefold() in words
    if says_yes == says_no:
        return "unknown"
    return "mismatch" if says_yes else "match"


@dataclass(frozen=True)
class RelevanceSettings(DrawSettings):
    """What changes the verdicts, beside the model. `constrained`: vLLM decodes one of the two words."""

    tries: int = 2
    max_tokens: int = 16
    style: str = "paper"
    constrained: bool = True

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "style", self.style in STYLES, f"one of {', '.join(STYLES)}"
        yield from super().rules()


@dataclass(frozen=True)
class RelevanceQuestions:
    """See `embedrl_verl.annotate.questions.Questions`: one question a pair with both T-CoTs."""

    settings: RelevanceSettings

    @property
    def style(self) -> RelevanceStyle:
        return STYLES[self.settings.style]

    def described(self) -> Mapping[str, object]:
        return {**asdict(self.settings), "template": digest(self.style.template)}

    def names(self, record: PairRecord) -> Sequence[str]:
        return (QUESTION,) if record.query.tcot.strip() and record.target.tcot.strip() else ()

    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        record = question.record
        text = self.style.prompt(record.item("query").instruction, record.query.tcot, record.target.tcot)
        choices = (self.style.yes_word, self.style.no_word) if self.settings.constrained else ()
        sampling = self.settings.sampling(question, redraw=True, choices=choices)
        return Prompt([{"role": "user", "content": text}]), sampling

    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        verdict = read_verdict(reply.text, self.style)
        return {"verdict": verdict, "problems": [NO_WORD] if verdict == "unknown" else []}
