# SPDX-License-Identifier: Apache-2.0
"""What has been answered so far, on the disk: one JSON object a line, appended and fsynced.

A journal belongs to one chunk of the input. Its first line is a header, which says whose it is; entries follow in the
order in which answers came; a closing line says that nothing is missing. A process that is killed while it writes
leaves a torn last line: it is cut off when the journal is opened again, and what it told is asked again. Any other
damage is an error, never skipped.

Writing is done by a thread (`flush`), several entries at once: an fsync for every answer would be slower than a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from embedrl_verl.data.files import disk_errors
from embedrl_verl.errors import DataError, EmbedRLError

Entry: TypeAlias = dict[str, Any]
_TAIL = 1 << 16


class JournalError(EmbedRLError):
    """Answers cannot be written down, for example because the disk is full; what was written before is kept."""


class Journal:
    """A journal that is open for appending. One thread at a time.

    Attributes:
        entries: what it held when it was opened, without header and closing line.
        lost: why entries could not be written; "" = all were. Nothing is written after it, for later entries may
            build on the lost ones.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        found, end = _read(self.path) if self.path.is_file() else ([], 0)
        if found and found[0] != dict(header):
            raise DataError(f"{self.path}: the journal is of other work: {found[0]}, not {dict(header)}; remove it")
        if found and "end" in found[-1]:
            raise DataError(f"{self.path}: the journal is closed; nothing can be added")
        self.entries = found[1:]
        self._end, self.lost = end, ""
        with disk_errors(self.path):
            is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._file, end)
            if not found:
                self._write([header])
            if is_new:
                _sync_folder(self.path.parent)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write entries; they are on the disk when this returns.

        Raises:
            JournalError: they are not, and none of them is in the file; or entries before them are not.
        """
        self._write(entries)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close the file; with a summary, say that the journal is complete. A closed one stays as it is.

        Raises:
            JournalError: entries could not be written before, so it is not complete.
        """
        if self._file < 0:
            return
        if summary is not None:
            if self.lost:
                raise JournalError(f"{self.path}: not complete, since entries could not be written; run again to go on")
            self._write([{"end": dict(summary)}])
        os.close(self._file)
        self._file = -1

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        if self.lost:
            raise JournalError(self.lost)
        data = b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries)
        left, end = memoryview(data), self._end
        try:
            while left:
                written = os.pwrite(self._file, left, end)
                left, end = left[written:], end + written
            os.fsync(self._file)
        except OSError as error:
            self.lost = f"{self.path}: cannot be written ({error}); mend it, then run the command again"
            os.ftruncate(self._file, self._end)  # so that nothing is ever written behind a torn line
            raise JournalError(self.lost) from error
        self._end = end


def read_journal(path: str | Path) -> list[Entry]:
    """The entries of a complete journal, without header and closing line."""
    found, _ = _read(Path(path))
    if len(found) < 2 or "end" not in found[-1]:
        raise DataError(f"{path}: the journal is not complete; run the command that writes it again")
    return found[1:-1]


def summary_of(path: str | Path, header: Mapping[str, Any]) -> Entry | None:
    """The summary of a complete journal; None if there is none or it is not complete. Reads its two ends only."""
    try:
        with open(path, "rb") as file:
            first = _decode(file.readline())
            if first is not None and first != dict(header):
                raise DataError(f"{path}: the journal is of other work: {first}, not {dict(header)}; remove it")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            last = _decode(file.read().split(b"\n")[-2] + b"\n") if size else None
    except (FileNotFoundError, IndexError):  # no journal, or one without a whole line
        return None
    return last["end"] if last is not None and isinstance(last.get("end"), dict) else None


def _read(path: Path) -> tuple[list[Entry], int]:
    """All whole lines, and where the last of them ends."""
    found: list[Entry] = []
    end, torn = 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            entry = _decode(line)
            if entry is None:
                torn = torn or number
                continue
            if torn:
                raise DataError(
                    f"{path}, line {torn}: damaged, and whole lines follow; restore the file, or remove it to ask its "
                    "rows again"
                )
            found.append(entry)
            end += len(line)
    return found, end


def _decode(line: bytes) -> Entry | None:
    """The object of a whole line, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
