# SPDX-License-Identifier: Apache-2.0
"""A T-CoT as a value, and the format term of the reward.

A T-CoT reads `<thinking>` reasoning with one JSON object of evidence `</thinking>` `<rethink>` a check `</rethink>`
`<answer>` a short answer `</answer>`. Evidence points at the input: words of a text, boxes in images, frames of a clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot.evidence import KINDS
from embedrl_verl.tcot.evidence.boxes import Box


@dataclass(frozen=True)
class TCoT:
    """What could be read of a T-CoT; `parse_tcot` makes it.

    Attributes:
        text: the raw text, untouched.
        thinking, rethink, answer: contents of the three parts without tags and outer white space; "" = not found.
        evidence: by evidence key what is valid under it, in the order in which it was written (also twice).
        problems: what is wrong, one line a rule; () if well formed.
    """

    text: str
    thinking: str = ""
    rethink: str = ""
    answer: str = ""
    evidence: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    problems: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """Text, lists and dicts alone, as they pass through a queue between processes."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TCoT:
        """What `to_plain` gave, also if tuples have become lists."""
        evidence = {key: tuple(map(KINDS[key].restore, found)) for key, found in plain["evidence"].items()}
        return cls(**{**plain, "evidence": evidence, "problems": tuple(plain["problems"])})

    @property
    def text_keywords(self) -> tuple[str, ...]:
        """Words of the input's text."""
        return self.evidence.get("text_keywords", ())

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes in the input's images."""
        return self.evidence.get("bbox_2d", ())

    @property
    def key_frames(self) -> tuple[int, ...]:
        """Frames of the input's clip, counted from 1."""
        return self.evidence.get("key_frames", ())

    @property
    def is_well_formed(self) -> bool:
        """Three parts in order, none empty, nothing outside; one JSON object, in `<thinking>`; valid evidence only."""
        return not self.problems

    def has_evidence(self, key: str) -> bool:
        """Whether anything valid was read under an evidence key."""
        if key not in KINDS:
            raise ConfigError(f"evidence key must be one of {', '.join(KINDS)}; got {key!r}")
        return bool(self.evidence.get(key))

    def sections(self) -> tuple[str, str]:
        """The raw text cut after its first `</thinking>`; the two parts joined are the text, character by character.

        Without `</thinking>` all of the text is the first part. Evidence crops belong between the two.
        """
        thinking, tag, rest = self.text.partition("</thinking>")
        return thinking + tag, rest


def format_reward(tcot: TCoT, required: str | None = None) -> float:
    """F in R = alpha F + beta J + gamma O (eq. 5): 1.0 if the T-CoT is well formed and carries the evidence that its
    input calls for, else 0.0. `required` is the evidence key of the input's kind; None asks for no particular one."""
    return float(tcot.is_well_formed and (required is None or tcot.has_evidence(required)))
