# SPDX-License-Identifier: Apache-2.0
"""The relevance judge (method section 5): are the T-CoTs of a query and of its target obviously irrelevant to each
other, or in conflict, given the task?

No keeps the pair ("match"), Yes does not ("mismatch"); the judge is told to say No in doubt. What names neither, or
both, is "unknown" and never counted as an opinion; so is a pair that lacks a T-CoT. Where the server is vLLM (or the
engine), decoding is constrained to the two words.

Styles are YAML files in `templates/`, `relevance_<style>.yaml`, with the keys

    style        its name
    shows        "text": whole T-CoTs; "answer": what stands in their <answer>
    one_line     true: white space in a shown text becomes single spaces
    delimiters   names of tags that the template uses; tags of these names in a shown text are broken up
    yes_word, no_word   the two words
    join         what stands between blocks
    instruction  a line with $value, the task; "" leaves it out
    layout       blocks, which may use $instruction, $query, $target; one that comes out empty is left out
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from string import Template
from typing import Any

import yaml

from embedrl_verl.annotate.backends import Refused, Reply, Sampling
from embedrl_verl.annotate.journal import Entry
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.annotate.runner import Errand
from embedrl_verl.annotate.seeds import seed_of, temperature_of
from embedrl_verl.curate.verdict_file import Verdict
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.tcot.harmless import break_control, break_tags

STYLES = ("paper", "compact")
ERRAND = "relevance"
NO_WORD = "names neither word, or both"


@dataclass(frozen=True)
class RelevanceStyle:
    """A style; see the module for its fields."""

    style: str
    shows: str
    one_line: bool
    delimiters: tuple[str, ...]
    yes_word: str
    no_word: str
    join: str
    instruction: str
    layout: tuple[str, ...]

    def prompt(self, instruction: str, query_tcot: str, target_tcot: str) -> str:
        """The question about two T-CoTs. They, and the instruction, are put in as data."""
        wish = Template(self.instruction).substitute(value=self._harmless(instruction)) if instruction.strip() else ""
        values = {"query": self._shown(query_tcot), "target": self._shown(target_tcot), "instruction": wish}
        blocks = [Template(layout).substitute(values) for layout in self.layout]
        return self.join.join(block for block in blocks if block.strip())

    def _shown(self, tcot: str) -> str:
        return self._harmless(parse_tcot(tcot).answer if self.shows == "answer" else tcot)

    def _harmless(self, text: str) -> str:
        text = " ".join(text.split()) if self.one_line else text.strip()
        return break_tags(break_control(text), self.delimiters)


@functools.cache
def load_relevance_style(name: str) -> RelevanceStyle:
    """A style that ships with the package."""
    if name not in STYLES:
        raise ConfigError(f"the relevance judge's style must be one of {', '.join(STYLES)}; got {name!r}")
    values = yaml.safe_load(_template(name))
    lists = {key: tuple(values[key]) for key in ("delimiters", "layout")}
    return RelevanceStyle(**{**values, **lists})


def read_verdict(text: str, style: RelevanceStyle) -> Verdict:
    """What a reply says: one of the two words, whatever stands around it, and not the other."""
    words = {word.casefold() for word in re.findall(r"\w+", text)}
    says_yes, says_no = style.yes_word.casefold() in words, style.no_word.casefold() in words
    if says_yes == says_no:
        return "unknown"
    return "mismatch" if says_yes else "match"


@dataclass(frozen=True)
class RelevanceSettings:
    """What changes the verdicts, beside the model.

    Attributes:
        style: the prompt.
        tries: how often one pair is asked about, at most; later tries are drawn at `retry_temperature` or above.
        temperature, max_tokens: of the reply.
        constrained: have the server decode one of the two words, where it is vLLM.
        seed: of the draws.
    """

    style: str = "paper"
    tries: int = 2
    temperature: float = 0.0
    retry_temperature: float = 0.7
    max_tokens: int = 16
    constrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("style", self.style in STYLES, f"one of {', '.join(STYLES)}"),
            ("tries", self.tries >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("retry_temperature", 0 <= self.retry_temperature <= 2, "between 0 and 2"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{key.replace('_', '-')} must be {rule}; got {getattr(self, key)!r}")


@dataclass(frozen=True)
class RelevanceAsker:
    """See `embedrl_verl.annotate.runner.Asker`."""

    settings: RelevanceSettings

    def described(self) -> Mapping[str, Any]:
        """All that changes the verdicts but the model and the input, as JSON values."""
        template = hashlib.sha256(_template(self.settings.style).encode()).hexdigest()
        return {**asdict(self.settings), "template": template}

    def errands(self, record: PairRecord) -> Sequence[str]:
        """One verdict; none without both T-CoTs."""
        return (ERRAND,) if record.query.tcot.strip() and record.target.tcot.strip() else ()

    def ask(self, errand: Errand) -> tuple[Prompt, Sampling]:
        """The question of the next try."""
        settings, record, number = self.settings, errand.record, len(errand.tries)
        style = load_relevance_style(settings.style)
        text = style.prompt(record.item("query").instruction, record.query.tcot, record.target.tcot)
        temperature = settings.temperature
        if settings.tries > 1:
            temperature = temperature_of(number, temperature, settings.retry_temperature)
        seed = seed_of(settings.seed, record.pair_id, ERRAND, number)
        choices = (style.yes_word, style.no_word) if settings.constrained else ()
        sampling = Sampling(settings.max_tokens, temperature, seed=seed, choices=choices)
        return Prompt([{"role": "user", "content": text}]), sampling

    def read(self, errand: Errand, prompt: Prompt, reply: Reply | Refused) -> Entry:
        """What came of a try."""
        entry: Entry = {"source": errand.record.data_source}
        if isinstance(reply, Refused):
            return entry | {"verdict": "unknown", "text": "", "done": True, "ok": False, "cause": reply.cause}
        verdict = read_verdict(reply.text, load_relevance_style(self.settings.style))
        entry |= {"verdict": verdict, "text": reply.text, "in": reply.prompt_tokens, "out": reply.completion_tokens}
        if verdict != "unknown":
            return entry | {"done": True, "ok": True}
        return entry | {"done": len(errand.tries) + 1 >= self.settings.tries, "ok": False, "cause": NO_WORD}


def _template(name: str) -> str:
    folder = resources.files("embedrl_verl.curate").joinpath("templates")
    return folder.joinpath(f"relevance_{name}.yaml").read_text(encoding="utf-8")
