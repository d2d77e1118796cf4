# SPDX-License-Identifier: Apache-2.0
"""All answers of a job on the disk: one JSON object a line, one line a try, in the order in which they came.

A process that is killed while it writes leaves a torn last line: it is cut off, and what it held is asked again. Any
other damage is an error, never skipped.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedrl_verl.data.files import disk_errors
from embedrl_verl.errors import DataError, ResourceError

Entry: TypeAlias = dict[str, Any]
"""What came of a try: `id`, `question`, `try`; `done` (no further try), `ok` (a result), `cause`; and more."""
ANSWERS_FILE = "answers.jsonl"
FLUSH_S = 0.2


class Answers:
    """The answers of a file (made if missing), by pair id and question; `seen` is called with every entry, in order. In
    memory are 16 bytes a line."""

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
        order = np.argsort(np.frombuffer(keys, np.int64), kind="stable")
        self._keys, self._places = (array("q", np.frombuffer(one, np.int64)[order].tobytes()) for one in (keys, places))
        self._file = open(path, "rb")  # noqa: SIM115

    def tries(self, pair_id: str, question: str) -> tuple[Entry, ...]:
        """All tries of a question, oldest first."""
        key, found = hash((pair_id, question)), []
        for place in self._places[bisect_left(self._keys, key) : bisect_right(self._keys, key)]:
            self._file.seek(place)
            found.append(json.loads(self._file.readline()))
        return tuple(entry for entry in found if (entry["id"], entry["question"]) == (pair_id, question))


class AnswerWriter:
    """Appends answers from a thread, several at once: an fsync for each would be slower than a GPU. A context manager;
    at its end all are on the disk. After a ResourceError nothing more is written: a later try may build on a lost one.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND)
        self._new: deque[bytes] = deque()
        self._closing = threading.Event()
        self._error: ResourceError | None = None
        self._thread = threading.Thread(target=self._run, name="answers")

    def put(self, entry: Entry) -> None:
        """Have it written within `FLUSH_S`."""
        if self._error is not None:
            raise self._error
        self._new.append(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def __enter__(self) -> AnswerWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        os.close(self._file)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                closing = self._closing.wait(FLUSH_S)
                data = b"".join(self._new.popleft() for _ in range(len(self._new)))
                with disk_errors(self._path):
                    while data:
                        data = data[os.write(self._file, data) :]
                        os.fsync(self._file)
        except ResourceError as error:
            self._error = error
