# SPDX-License-Identifier: Apache-2.0
"""Golden records: what each converter makes of its fixture, as JSON that a person can read.

`WRITE_GOLDEN=1 pytest tests/convert/test_golden.py` writes them anew; look at the difference before committing it.
Encoded media are named by the place in the fixture that they come from, so that the golden files do not depend on the
encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard
from embedrl_verl.convert.inputs import LocalRoot
from embedrl_verl.convert.rows import read_rows, survey
from embedrl_verl.convert.sources.colpali import ColPaliTrain
from embedrl_verl.convert.sources.llava_hound import LlavaHound
from embedrl_verl.convert.sources.mmeb import MmebTrain
from embedrl_verl.convert.sources.visrag import VisRagTrain
from embedrl_verl.data.schema import PairRecord

FOLDER = Path(__file__).parent / "golden"
PAIRS = 6


def conversions(roots: dict[str, Path]) -> dict[str, tuple[Converter, Path]]:
    """Golden name -> converter and the root that it reads."""
    hound, embed_rl = str(roots["llava_hound"]), str(roots["embed_rl"])
    return {
        "mmeb_original": (MmebTrain(negatives=True), roots["mmeb"]),
        "mmeb_diverse_instruction": (MmebTrain(split="diverse_instruction"), roots["mmeb"]),
        "llava_hound": (LlavaHound(hound, question_lines=PAIRS), roots["llava_hound"]),
        "llava_hound_embed_rl": (LlavaHound(embed_rl, embed_rl=True), roots["embed_rl"]),
        "colpali_answer": (ColPaliTrain("answer"), roots["colpali"]),
        "colpali_page": (ColPaliTrain("page"), roots["colpali"]),
        "visrag": (VisRagTrain(), roots["visrag"]),
    }


def raw_rows(converter: Converter, root: Path) -> Iterator[RawRow]:
    """Every row that the converter's shards name, read as the job reads them."""
    local = LocalRoot(root)
    for shard in converter.shards(local):
        found = survey(local, shard.file)
        stop = found.rows if shard.stop is None else min(found.rows, shard.stop)
        for number, values in read_rows(local, shard.file, np.arange(shard.start, stop)):
            if isinstance(values, RowError):
                raise values
            yield RawRow(shard, number, values)


def records_of(converter: Converter, root: Path) -> Iterator[PairRecord]:
    """The records of a whole root."""
    for row in raw_rows(converter, root):
        yield from converter.convert(row)


def readable(converter: Converter, root: Path) -> list[dict[str, Any]]:
    """The records as JSON values, without what is empty; of MMEB's sets the first two rows."""
    lines = []
    for row in raw_rows(converter, root):
        if converter.name == "mmeb_train" and row.row >= 2:
            continue
        for record in converter.convert(row):
            lines.append(_named(asdict(record), f"{row.shard.file}:{row.row}"))
    return lines


def _named(value: Any, place: str) -> Any:
    if isinstance(value, bytes):
        return f"bytes of {place}"
    if isinstance(value, dict):
        return {key: _named(part, place) for key, part in value.items() if part not in ("", None, (), [])}
    return [_named(part, place) for part in value] if isinstance(value, list | tuple) else value


def one_row(values: dict[str, Any], source: str = "s", note: str = "", row: int = 0) -> RawRow:
    """A row as if it came from a file of its own."""
    return RawRow(Shard("rows.jsonl", source, note=note), row, values)
