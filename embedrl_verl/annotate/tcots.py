# SPDX-License-Identifier: Apache-2.0
"""The questions of `embedrl data annotate`: a T-CoT for each side of a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from embedrl_verl.annotate.backends import Refused, Reply, Sampling
from embedrl_verl.annotate.journal import Entry
from embedrl_verl.annotate.prompts import Prompt, TcotPrompts, again, gold_answer_of, templates_digest
from embedrl_verl.annotate.replies import LEVELS, EvidenceLevel, check_tcot, rule_of
from embedrl_verl.annotate.runner import Errand
from embedrl_verl.annotate.seeds import is_in_share, seed_of, temperature_of
from embedrl_verl.data.schema import SIDES, PairRecord, Side, input_kind
from embedrl_verl.errors import ConfigError
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND

REASK_MODES = ("explain", "resample")


@dataclass(frozen=True)
class TcotSettings:
    """What changes the answers, beside the questions' wording (`TcotPrompts`) and the model.

    Attributes:
        sides: which sides get a T-CoT.
        overwrite: also sides that have one.
        tries: how often one side is asked about, at most.
        reask: after a bad reply, "explain" what is wrong in a conversation, or "resample": the same question, another
            seed, at `retry_temperature` or above. Where replies may be resampled, none is quite greedy
            (`embedrl_verl.annotate.seeds.ALMOST_GREEDY`).
        temperature, top_p, max_tokens: of the replies.
        evidence: see `embedrl_verl.annotate.replies`.
        gold_share: share of the queries with a text target that are asked with the answer given. Rows are drawn by a
            hash of seed and pair id.
        seed: of all draws.
    """

    sides: tuple[Side, ...] = SIDES
    overwrite: bool = False
    tries: int = 3
    reask: str = "explain"
    temperature: float = 0.0
    top_p: float = 1.0
    retry_temperature: float = 0.7
    max_tokens: int = 1024
    evidence: EvidenceLevel = "usable"
    gold_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("sides", bool(self.sides) and set(self.sides) <= set(SIDES), "query, target or both"),
            ("tries", self.tries >= 1, "1 or more"),
            ("reask", self.reask in REASK_MODES, f"one of {', '.join(REASK_MODES)}"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("retry_temperature", 0 <= self.retry_temperature <= 2, "between 0 and 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("evidence", self.evidence in LEVELS, f"one of {', '.join(LEVELS)}"),
            ("gold_share", 0 <= self.gold_share <= 1, "between 0 and 1"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"{key.replace('_', '-')} must be {rule}; got {getattr(self, key)!r}")


@dataclass(frozen=True)
class TcotAsker:
    """See `embedrl_verl.annotate.runner.Asker`."""

    settings: TcotSettings
    prompts: TcotPrompts

    def described(self) -> Mapping[str, Any]:
        """All that changes the answers but the model and the input, as JSON values."""
        prompts = asdict(self.prompts)
        return {
            **asdict(self.settings),
            "prompts": {**prompts, "templates": templates_digest(self.prompts.style)},
        }

    def errands(self, record: PairRecord) -> Sequence[str]:
        """The sides that want a T-CoT."""
        return [side for side in self.settings.sides if self.settings.overwrite or not record.item(side).tcot]

    def ask(self, errand: Errand) -> tuple[Prompt, Sampling]:
        """The question of the next try."""
        settings, side, tries = self.settings, side_of(errand.name), errand.tries
        prompt = self.prompts.prompt(errand.record, side, self._gold(errand.record, side))
        temperature = settings.temperature
        if settings.reask == "resample" and settings.tries > 1:
            temperature = temperature_of(len(tries), temperature, settings.retry_temperature)
        elif tries:
            prompt = again(prompt, tries[-1]["text"], tries[-1]["problems"])
        seed = seed_of(settings.seed, errand.record.pair_id, side, len(tries))
        return prompt, Sampling(settings.max_tokens, temperature, settings.top_p, seed)

    def read(self, errand: Errand, prompt: Prompt, reply: Reply | Refused) -> Entry:
        """What came of a try."""
        side = side_of(errand.name)
        kind = input_kind(errand.record, side)
        entry: Entry = {"source": errand.record.data_source, "kind": kind}
        if self._gold(errand.record, side) is not None:
            entry["gold"] = True
        if isinstance(reply, Refused):
            return entry | {"text": "", "problems": [reply.detail], "done": True, "ok": False, "cause": reply.cause}
        checked = check_tcot(
            reply.text,
            item=errand.record.item(side),
            prompt=prompt,
            required=EVIDENCE_KEY_OF_KIND[kind],
            family=self.prompts.family,
            level=self.settings.evidence,
            cut_off=reply.cut_off,
        )
        entry |= {"text": reply.text, "in": reply.prompt_tokens, "out": reply.completion_tokens}
        entry |= {"problems": list(checked.problems), "notes": list(checked.notes)}
        if not checked.problems:
            return entry | {"done": True, "ok": True}
        is_last = len(errand.tries) + 1 >= self.settings.tries
        return entry | {"done": is_last, "ok": False, "cause": rule_of(checked.problems[0])}

    def _gold(self, record: PairRecord, side: Side) -> str | None:
        gold = gold_answer_of(record, side)
        if gold is None or not is_in_share(self.settings.gold_share, self.settings.seed, "gold", record.pair_id):
            return None
        return gold


def side_of(name: str) -> Side:
    """The side that an errand is named after."""
    return "query" if name == "query" else "target"
