# SPDX-License-Identifier: Apache-2.0
"""How the judge is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedrl_verl.errors import ConfigError
from embedrl_verl.judge.prompt import JUDGE_STYLES

_OURS = ("model", "messages", "max_tokens", "temperature", "structured_outputs")


@dataclass(frozen=True)
class JudgeSettings:
    """See also `judge_lists` and `judge_prompt`.

    Attributes:
        model: the served model's name; None asks the server once.
        hard_pairs: other pairs in a list.
        shared_lists: one list for all rollouts of a prompt.
        style: the prompt.
        constrained: have the server decode one of the listed numbers, where it is vLLM. Otherwise, or without it, the
            answer is parsed.
        max_tokens, temperature: of the answer.
        deadline_s: seconds for all requests of a step; rows without an answer by then are unknown.
        seed: of the lists' order.
        images: show the judged input's images.
        max_unknown_share: share of the rows with a list that may stay unknown; above it the step stops.
        extra_body: more fields of every request, such as {"chat_template_kwargs": {"enable_thinking": False}}.

    Raises:
        ConfigError: a value that cannot work.
    """

    model: str | None = None
    hard_pairs: int = 4
    shared_lists: bool = True
    style: str = "paper"
    constrained: bool = True
    max_tokens: int = 8
    temperature: float = 0.0
    deadline_s: float = 300.0
    seed: int = 0
    images: bool = False
    max_unknown_share: float = 0.5
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        overridden = sorted(set(self.extra_body) & set(_OURS))
        rules = (
            ("model", self.model is None or bool(self.model.strip()), "a name, or null to ask the server"),
            ("hard_pairs", self.hard_pairs >= 1, "1 or more"),
            ("style", self.style in JUDGE_STYLES, f"one of {', '.join(JUDGE_STYLES)}"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more and finite"),
            ("deadline_s", 0 < self.deadline_s < float("inf"), "positive and finite"),
            ("max_unknown_share", 0 <= self.max_unknown_share <= 1, "between 0 and 1"),
            ("extra_body", not overridden, f"without {', '.join(_OURS)}, which have keys of their own or none"),
        )
        for key, holds, rule in rules:
            if not holds:
                raise ConfigError(f"embedrl.judge.{key} must be {rule}; got {getattr(self, key)!r}")
