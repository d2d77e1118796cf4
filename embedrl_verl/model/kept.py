# SPDX-License-Identifier: Apache-2.0
"""T-CoTs that are kept in files, so that a second run need not write them again.

    <folder>/<name>.jsonl    {"id": "q17", "split": "test", ..., "asked": "<sha256>", "text": "<thinking>...",
                              "seen_sizes": [[560, 420]]}

A T-CoT is used again only for the same question: `asked` is of the input's text, instruction and pixels, and of the
Reasoner and how it is asked. A line of another prompt, data revision or Reasoner stays in the file and is not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedrl_verl.data.files import disk_errors
from embedrl_verl.errors import DataError
from embedrl_verl.model.tcots import Ask, Writes, Written

Label = Mapping[str, str]
"""What names an input for a reader of the file; empty: nothing does."""


class KeptTcots:
    """A Reasoner that keeps what it wrote.

    Args:
        reasoner: writes what is not known.
        folder: of the files; made when the first T-CoT is kept.
        asked_by: tells the Reasoner, and how it is asked, from every other.
    """

    def __init__(self, reasoner: Writes, folder: str | Path, asked_by: str) -> None:
        self.family = reasoner.family
        self._reasoner, self._folder, self._asked_by = reasoner, Path(folder), asked_by
        self._files: dict[str, _File] = {}
        self._name, self._labels = "", tuple[Label, ...]()

    def about(self, name: str, labels: Sequence[Label]) -> None:
        """What the next `write` is about: the name of the file, and a label for each of its inputs."""
        self._name, self._labels = name, tuple(labels)

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """See `Writes`."""
        if len(asks) != len(self._labels):
            raise DataError(f"T-CoTs of {len(self._labels)} named inputs were announced (about); got {len(asks)}")
        if self._name not in self._files:
            self._files[self._name] = _File(self._folder / f"{self._name.replace('/', '_')}.jsonl")
        file = self._files[self._name]
        digests = [_digest(ask, self._asked_by) for ask in asks]
        missing = {digest: ask for digest, ask in zip(digests, asks, strict=True) if digest not in file.known}
        written = dict(zip(missing, self._reasoner.write(list(missing.values())), strict=True)) if missing else {}
        file.known |= {digest: one for digest, one in written.items() if one.text is not None}
        file.keep(digests, self._labels)
        return [file.known.get(digest) or written[digest] for digest in digests]


class _File:
    """One file; `known`: T-CoTs by digest of what was asked."""

    def __init__(self, path: Path) -> None:
        self.known: dict[str, Written] = {}
        self._path = path
        self._kept: set[tuple[str, str]] = set()
        if not path.exists():
            return
        with disk_errors(path), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = file.read()
            end = content.rfind(b"\n") + 1
            file.truncate(end)  # half a line: its writer was killed
        for number, line in enumerate(content[:end].splitlines(), start=1):
            self._read(line, number)

    def _read(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            sizes = row.pop("seen_sizes")
            asked, text = str(row.pop("asked")), str(row.pop("text"))
            seen = None if sizes is None else tuple((int(width), int(height)) for width, height in sizes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self._path}, line {number}: not a kept T-CoT ({type(error).__name__}: {error}); remove the line"
            ) from error
        self.known[asked] = Written(text, seen)
        self._kept.add((_name(row), asked))

    def keep(self, digests: Sequence[str], labels: Sequence[Label]) -> None:
        """Append a line for every label that has none; whole lines only, also beside another process."""
        lines = []
        for digest, label in zip(digests, labels, strict=True):
            key = (_name(label), digest)
            if digest in self.known and key not in self._kept:
                one = self.known[digest]
                row = {**label, "asked": digest, "text": one.text, "seen_sizes": one.seen_sizes}
                lines.append(json.dumps(row) + "\n")
                self._kept.add(key)
        if lines:
            with disk_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    file.write("".join(lines).encode())


def _name(label: Mapping[str, Any]) -> str:
    return json.dumps(dict(label), sort_keys=True)


def _digest(ask: Ask, asked_by: str) -> str:
    item = ask.item
    times = None if item.times is None else (item.times.rate, item.times.indices, item.times.total)
    shapes = [image.size for image in item.images], [frame.size for frame in item.frames]
    words = repr((asked_by, ask.kind, item.text, item.instruction, times, shapes))
    digest = hashlib.sha256(words.encode(errors="surrogatepass"))
    for image in (*item.images, *item.frames):
        digest.update(image.tobytes())
    return digest.hexdigest()
