# SPDX-License-Identifier: Apache-2.0
"""What each converter makes of its fixture; golden/*.json hold it as a person can read it.

`WRITE_GOLDEN=1 pytest tests/convert/test_scripts.py` writes them anew; look at the difference before committing it.
Encoded media are named by the place in the fixture that they come from, whatever the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_preprocess.colpali_train import SOURCES as COLPALI
from data_preprocess.colpali_train import ColPaliTrain
from data_preprocess.llava_hound import SOURCES as HOUND
from data_preprocess.llava_hound import LlavaHound
from data_preprocess.mmeb_train import SOURCES as MMEB
from data_preprocess.mmeb_train import MmebTrain
from data_preprocess.visrag_train import SOURCE as VISRAG
from data_preprocess.visrag_train import VisRagTrain
from embedrl_verl.convert.converter import Converter, RawRow, Shard
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.rows import as_arrow, count_rows, is_jsonl, read_rows
from embedrl_verl.data.schema import PairRecord

ALL_SOURCES = (*MMEB.values(), *HOUND.values(), *COLPALI.values(), VISRAG)
FOLDER = Path(__file__).parent / "golden"
PAIRS = 6
CONVERSIONS: dict[str, tuple[Converter, str]] = {
    "mmeb_original": (MmebTrain(negatives=True), "mmeb"),
    "mmeb_diverse_instruction": (MmebTrain(split="diverse_instruction"), "mmeb"),
    "llava_hound": (LlavaHound(question_lines=PAIRS), "llava_hound"),
    "llava_hound_embed_rl": (LlavaHound(embed_rl=True), "embed_rl"),
    "colpali_answer": (ColPaliTrain("answer"), "colpali"),
    "colpali_page": (ColPaliTrain("page"), "colpali"),
    "visrag": (VisRagTrain(), "visrag"),
}
"""Golden name -> converter and the fixture that it reads."""


def raw_rows(converter: Converter, root: Path) -> Iterator[RawRow]:
    """Every row that the converter's shards name, read as the job reads them."""
    inputs = InputRoot(root)
    with TemporaryDirectory() as cache:
        for shard in converter.shards(inputs):
            arrow = as_arrow(shard.file, inputs.path(shard.file), Path(cache))
            stop = min(count_rows(shard.file, arrow), shard.stop or 10**9)
            for number, values in read_rows(arrow, range(stop), is_jsonl(shard.file)):
                assert isinstance(values, dict)
                yield RawRow(shard, number, values, inputs.media_root)


def records_of(converter: Converter, root: Path) -> list[PairRecord]:
    return [*filter(None, map(converter.convert, raw_rows(converter, root)))]


def readable(converter: Converter, root: Path) -> list[dict[str, Any]]:
    """The records as JSON values, without what is empty; of MMEB's sets the first two rows."""
    rows = [row for row in raw_rows(converter, root) if converter.name != "mmeb_train" or row.row < 2]
    found = [(converter.convert(row), f"{row.shard.file}:{row.row}") for row in rows]
    return [_named(asdict(record), place) for record, place in found if record is not None]


def _named(value: Any, place: str) -> Any:
    if isinstance(value, bytes):
        return f"bytes of {place}"
    if isinstance(value, dict):
        return {key: _named(part, place) for key, part in value.items() if part not in ("", None, (), [])}
    return [_named(part, place) for part in value] if isinstance(value, list | tuple) else value


def one_row(values: dict[str, Any], source: str = "s", note: str = "", media_root: Path | None = None) -> RawRow:
    """A row as if it came from a file of its own."""
    return RawRow(Shard("rows.jsonl", source, note=note), 0, values, media_root)
