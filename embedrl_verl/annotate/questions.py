# SPDX-License-Identifier: Apache-2.0
"""One thing to find out about a row, such as the T-CoT of its query; what may be asked, and how replies are drawn.

Draws depend on a pair's id alone, so an answer does not depend on what was asked before or beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from embedrl_verl.annotate.answers import Entry
from embedrl_verl.annotate.backends import Reply, Sampling
from embedrl_verl.annotate.prompts import Prompt
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import ConfigError

ALMOST_GREEDY = 0.01
"""Temperature at which vLLM samples with a seed and comes to what greedy decoding gives (it raises lower ones to this).
Its CPU sampler heeds seeds only while every request of a batch is sampled with one, so a greedy request would make the
draws of those beside it depend on chance."""


@dataclass(frozen=True)
class Question:
    """What to find out about a record, the entries of earlier tries, and where the record is. Tries `before` a question
    was asked from the start again are only counted."""

    record: PairRecord
    name: str
    tries: tuple[Entry, ...] = ()
    file: str = ""
    row: int = 0
    before: int = 0


@dataclass(frozen=True)
class DrawSettings:
    """How replies are drawn; `retry_temperature` is of those that are drawn again, at least."""

    tries: int = 3
    temperature: float = 0.0
    retry_temperature: float = 0.7
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, rule in self.rules():
            if not holds:
                raise ConfigError(f"{name.replace('_', '-')} must be {rule}; got {getattr(self, name)!r}")

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """Fields, whether they hold, and what they must be."""
        for name in ("tries", "max_tokens"):
            yield name, getattr(self, name) >= 1, "1 or more"
        for name in ("temperature", "retry_temperature"):
            yield name, 0 <= getattr(self, name) <= 2, "between 0 and 2"

    def sampling(self, question: Question, *, redraw: bool, **more: Any) -> Sampling:
        """Of a question's next try. `redraw`: a refused reply is drawn again, so no try is quite greedy."""
        number, temperature = len(question.tries), self.temperature
        if redraw and self.tries > 1:
            temperature = max(ALMOST_GREEDY, temperature, self.retry_temperature if number else 0.0)
        seed = seed_of(self.seed, question.record.pair_id, question.name, number)
        return Sampling(self.max_tokens, temperature, seed=seed, **more)


class Questions(Protocol):
    """What is asked, and what is made of the replies."""

    @property
    def settings(self) -> DrawSettings: ...

    def described(self) -> Mapping[str, Any]:
        """All that changes the answers but the model and the input, as JSON values."""

    def names(self, record: PairRecord) -> Sequence[str]:
        """What to find out about a row; none is possible."""

    def request(self, question: Question) -> tuple[Prompt, Sampling]:
        """The question's next try; called in threads. DataError (unreadable media) rejects the row."""

    def check(self, question: Question, prompt: Prompt, reply: Reply) -> Entry:
        """`problems` of a reply, for which it is asked again, and more for its entry."""


def seed_of(seed: int, *key: object) -> int:
    """A seed in [0, 2^31) for one request."""
    return _number(seed, *key) >> 33


def is_in_share(share: float, seed: int, *key: object) -> bool:
    """Whether a key belongs to a random share of all keys. Raising the share only adds keys."""
    return _number(seed, *key) < share * 2.0**64


def _number(*key: object) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(repr(key).encode(errors="surrogatepass")).digest()[:8], "big")
