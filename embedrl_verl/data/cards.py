# SPDX-License-Identifier: Apache-2.0
"""What data cards say of the files beside them, so that a step that follows need not find it out again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedrl_verl.data.disk import sha256_of
from embedrl_verl.data.files import CARD_FILE, read_object

FORMAT = "embedrl pair records 1"
NOT_DECLARED = "not declared"


def card_beside(file: Path) -> dict[str, Any]:
    """The data card of the folder that a file lies in; {} without one."""
    card = file.parent / CARD_FILE
    return read_object(card) if card.is_file() else {}


def part_facts(path: Path, rows: int) -> dict[str, Any]:
    """A part's line in the data card."""
    return {"file": path.name, "records": rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def known_hash(file: Path) -> str | None:
    """SHA-256 of a part as the card beside it says, if the size agrees."""
    for part in card_beside(file).get("parts", ()):
        if part.get("file") == file.name and part.get("bytes") == file.stat().st_size:
            return str(part["sha256"]) if part.get("sha256") else None
    return None


def input_facts(file: Path) -> dict[str, Any]:
    """An input file's line in the data card; it is read only if no card beside it knows its hash."""
    return {"file": file.name, "sha256": known_hash(file) or sha256_of(file)}


def licences_of(files: Iterable[Path]) -> str:
    """What the cards beside the files declare, each licence once."""
    folders = {file.parent: file for file in files}.values()
    return "; ".join(dict.fromkeys(str(card_beside(file).get("licence") or NOT_DECLARED) for file in folders))
