# SPDX-License-Identifier: Apache-2.0
"""All answers of a job in one file: a JSON object a line, one line a try, in the order in which they came.

A process that is killed while it writes leaves a torn last line: it is cut off, and what it held is asked again. Any
other damage is an error, never skipped.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedrl_verl.data.files import disk_errors
from embedrl_verl.errors import DataError

Entry: TypeAlias = dict[str, Any]
"""What came of a try: `id`, `question`, `try`; `done` (no further try), `ok` (a result), `cause`; and more."""
ANSWERS_FILE = "answers.jsonl"


class Answers:
    """The answers of a file (made if missing); `seen` is called with each that is there. In memory are 16 bytes a
    line."""

    def __init__(self, path: Path, seen: Callable[[Entry], None] = lambda entry: None) -> None:
        keys, places, end, torn = array("q"), array("q"), 0, 0
        path.touch()
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    torn = torn or number
                    continue
                if torn:
                    raise DataError(
                        f"{path}, line {torn}: damaged, and whole lines follow; restore the file, or remove it to ask "
                        "everything again"
                    )
                keys.append(hash((entry["id"], entry["question"])))
                places.append(end)
                end += len(line)
                seen(entry)
        os.truncate(path, end)
        order = np.argsort(np.array(keys), kind="stable")
        self._keys, self._places = (array("q", np.array(one)[order].tobytes()) for one in (keys, places))
        self._path, self._end = path, end
        self._file, self._log = open(path, "rb"), os.open(path, os.O_WRONLY | os.O_APPEND)  # noqa: SIM115

    def tries(self, pair_id: str, question: str) -> tuple[Entry, ...]:
        """All tries of a question that were there, oldest first."""
        key, found = hash((pair_id, question)), []
        for place in self._places[bisect_left(self._keys, key) : bisect_right(self._keys, key)]:
            self._file.seek(place)
            found.append(json.loads(self._file.readline()))
        return tuple(entry for entry in found if (entry["id"], entry["question"]) == (pair_id, question))

    def put(self, entry: Entry) -> None:
        """Append one, which outlives the process. ResourceError: it could not be written, and nothing of it is left."""
        line = rest = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with disk_errors(self._path):
            try:
                while rest:
                    rest = rest[os.write(self._log, rest) :]
            except OSError:
                os.truncate(self._path, self._end)  # the next line would follow a half one
                raise
        self._end += len(line)

    def close(self) -> None:
        """End writing; all is on the disk."""
        with disk_errors(self._path):
            os.fsync(self._log)
            os.close(self._log)
        self._file.close()
