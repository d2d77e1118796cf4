# SPDX-License-Identifier: Apache-2.0
"""The output folder of a job that asks a model: begun, gone on with, or found finished.

`_work/` holds the settings that change answers, the journals and what is being put together. A folder is only ever gone
on with under the same settings, by one process at a time. `data_card.json` is written last; then `_work/` goes. A
process that is killed in between finds the card with its settings' hash, and only tidies up.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from embedrl_verl.data.files import (
    CARD_FILE,
    PART_PATTERN,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    only_writer,
    read_object,
    write_json,
)
from embedrl_verl.errors import ConfigError

SETTINGS_FILE, SERVED_FILE = "settings.json", "served.json"
HASH_KEY = "settings_hash"


class WorkFolder:
    """A context manager; inside it this process alone works in the folder.

    Args:
        out: the output folder.
        settings: everything that changes the answers, as JSON values.
        command: the command line that goes on with the folder.
        results: patterns of finished files, of which there must be none when the folder is begun.

    Attributes:
        path: `_work/`.
        is_finished: nothing is left to do.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], command: Sequence[str], results: Sequence[str] = (PART_PATTERN,)
    ) -> None:
        self.out, self.path = out, out / WORK_FOLDER
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._command, self._results = command, results
        self._held = ExitStack()
        self.is_finished = False

    @property
    def hash(self) -> str:
        """Of the settings; stands in journals and in the data card."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:32]

    def __enter__(self) -> WorkFolder:
        card = self.out / CARD_FILE
        if card.is_file():
            self._check_finished(card)
            return self
        if not self.path.exists() and any(found for pattern in self._results for found in self.out.glob(pattern)):
            raise ConfigError(f"{self.out} holds files of other work; name a new folder, or remove this one")
        with disk_errors(self.out):
            self._begin()
        return self

    def _begin(self) -> None:
        begin_work(self.out, self._command)
        with ExitStack() as held:
            held.enter_context(only_writer(self.out))
            state = self.path / SETTINGS_FILE
            if state.is_file():
                self._compare(json.loads(state.read_bytes()), self.settings, "was begun")
            else:
                write_json(state, self.settings)
            self._held = held.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def served(self, facts: Mapping[str, Any]) -> None:
        """Note what is served the first time, and refuse anything else later."""
        file, found = self.path / SERVED_FILE, json.loads(json.dumps(facts))
        if file.is_file():
            self._compare(json.loads(file.read_bytes()), found, "was begun")
        else:
            with disk_errors(self.out):
                write_json(file, found)

    def check_wanted(self, wanted: Mapping[str, Any]) -> None:
        """Refuse facts that the user has named and that are not those of what was served."""
        known = self.known_served() or {}
        found = json.loads(json.dumps(wanted))
        self._compare(
            {name: known.get(name) for name in found}, found, "is finished" if self.is_finished else "was begun"
        )

    def known_served(self) -> dict[str, Any] | None:
        """What was served; None before it is known."""
        if self.is_finished:
            served: dict[str, Any] | None = read_object(self.out / CARD_FILE).get("served")
            return served
        file = self.path / SERVED_FILE
        return json.loads(file.read_bytes()) if file.is_file() else None

    def finish(self, card: Mapping[str, Any]) -> None:
        """Write the data card, which says that the folder is complete, and remove `_work/`."""
        write_json(self.out / CARD_FILE, {**card, HASH_KEY: self.hash})
        self._remove_work()

    def _check_finished(self, card: Path) -> None:
        found = read_object(card)
        if found.get(HASH_KEY) != self.hash:
            self._compare(found.get("settings") or {}, self.settings, "is finished")
            raise ConfigError(f"{self.out} is finished, and was made by another command; name a new folder")
        self._remove_work()
        self.is_finished = True

    def _compare(self, begun: Mapping[str, Any], now: Mapping[str, Any], state: str) -> None:
        before, after = _flat(begun), _flat(now)
        differing = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        if differing:
            shown = "; ".join(f"{key} {before.get(key)!r}, now {after.get(key)!r}" for key in differing[:5])
            raise ConfigError(
                f"{self.out} {state} with other settings ({shown}), and answers to different questions must not mix: "
                "use the same, or another folder, or remove this one"
            )

    def _remove_work(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
