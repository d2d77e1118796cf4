# SPDX-License-Identifier: Apache-2.0
"""A command that asks a model about every row: begin or go on with its folder, ask what is open, write the result."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from embedrl_verl.annotate.answers import ANSWERS_FILE, Answers, Entry
from embedrl_verl.annotate.backends import Backend
from embedrl_verl.annotate.questions import Questions
from embedrl_verl.annotate.rows import Rows, footer_digest
from embedrl_verl.annotate.runner import Runner, RunnerSettings
from embedrl_verl.data.build import build_facts, building, difference
from embedrl_verl.data.files import CARD_FILE, read_object, write_json
from embedrl_verl.errors import ConfigError, DataError

SERVED_FILE = "served.json"


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of prompts and of replies, in any currency; None: not told."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        if min(self.prompt or 0, self.completion or 0) < 0:
            raise ConfigError(f"prices must be 0 or more; got {self}")

    def cost(self, counts: Mapping[str, int]) -> dict[str, float]:
        """{"cost"} of the tokens counted; {} without any price."""
        if self.prompt is self.completion is None:
            return {}
        money = (self.prompt or 0) * counts["prompt_tokens"] + (self.completion or 0) * counts["completion_tokens"]
        return {"cost": round(money / 1e6, 6)}


def tokens_of(tries: Iterable[Entry]) -> Counter[str]:
    """Replies and tokens of a question; a refused request has neither."""
    found = Counter[str]()
    for entry in tries:
        if "out" in entry:
            found.update(replies=1, prompt_tokens=entry["in"] or 0, completion_tokens=entry["out"] or 0)
    return found


@dataclass(frozen=True)
class Job(ABC):
    """One annotation, or one pass of the judge. `command` is what goes on with it, told to whoever needs the folder."""

    files: Sequence[Path]
    out: Path
    questions: Questions
    backend: Backend
    runner: RunnerSettings
    rows_per_part: int = 2048
    prices: Prices = field(default_factory=Prices)
    command: Sequence[str] = ()

    name: ClassVar[str]

    def run(self, say: Callable[[str], None] = print) -> int:
        """Do what is left to do. Returns 0, or 3 if a row of the input cannot be used (see rejected.jsonl)."""
        rows = Rows(self.files, self.rows_per_part)
        facts = build_facts(f"data {self.name}", self.settings(), self.files)
        for entry, file in zip(facts["input"], self.files, strict=True):
            entry["footer"] = footer_digest(file)
        stamps = [file.stat().st_mtime_ns for file in self.files]  # a footer may outlast an exchange of rows
        with building(self.out, facts, self.command, stamps=stamps) as work:
            if work is None:
                card = read_object(self.out / CARD_FILE)
                self._check_served(card["served"], self.backend.wanted())
                say(f"{self.out} is finished; nothing to do")
            else:
                served = self._ask(work, rows)
                card = self.write(work, rows, Answers(work / ANSWERS_FILE), facts, served)
        for line in self.report(card):
            say(line)
        return DataError.exit_code if card["rejected"]["rows"] else 0

    def settings(self) -> dict[str, Any]:
        """All that changes the output but the model and the input, as JSON values."""
        return dict(self.questions.described())

    @abstractmethod
    def write(
        self, work: Path, rows: Rows, answers: Answers, facts: Mapping[str, Any], served: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the output and its card; returns the card."""

    @abstractmethod
    def report(self, card: Mapping[str, Any]) -> list[str]:
        """Lines for the terminal."""

    def _ask(self, work: Path, rows: Rows) -> dict[str, Any]:
        """Complete the answers; returns what has answered."""
        file = work / SERVED_FILE

        def note(facts: Mapping[str, Any]) -> None:
            if file.is_file():
                self._check_served(read_object(file), facts)
            else:
                write_json(file, facts)

        if file.is_file():
            note(self.backend.wanted())
        asyncio.run(Runner(rows, self.questions, self.backend, work, self.runner, note, self.name).run())
        return read_object(file) if file.is_file() else dict(self.backend.wanted())

    def _check_served(self, served: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        found = json.loads(json.dumps(now))
        if changed := difference({name: served.get(name) for name in found}, found):
            raise ConfigError(
                f"{self.out} has answers of another model or server: {changed}, and answers to different questions "
                "must not mix: use the same, or another folder, or remove this one"
            )
