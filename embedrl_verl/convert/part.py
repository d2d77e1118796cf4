# SPDX-License-Identifier: Apache-2.0
"""One part: rows in, a parquet file of pair records and a report out. Runs in a worker process."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard
from embedrl_verl.convert.media_store import MediaStore
from embedrl_verl.convert.rows import Raw, is_jsonl, read_rows
from embedrl_verl.data.build import Report
from embedrl_verl.data.schema import Item, PairRecord, Video, input_kind
from embedrl_verl.data.writer import PairWriter
from embedrl_verl.errors import DataError, EmbedRLError


@dataclass(frozen=True)
class Task:
    """Rows (ascending) that make one part. `repeated`: row -> why it is rejected, when an earlier record has its id."""

    shard: Shard
    arrow: Path
    rows: Sequence[int]
    repeated: Mapping[int, str] = field(default_factory=dict)

    def where(self, row: int) -> str:
        """A row's place for people: rows count from 0, lines of a jsonl file from 1."""
        file = self.shard.file
        return f"{file}, line {row + 1}" if is_jsonl(file) else f"{file}, row {row}"


@dataclass(frozen=True)
class PartMaker:
    """`maker(task, part)` writes the part and returns its report, see data/build.py. `skipped` are the rows of the file
    that gave no record."""

    converter: Converter
    store: MediaStore

    def __call__(self, task: Task, part: Path) -> Report:
        skipped: list[int] = []
        rejected: list[dict[str, Any]] = []
        wordless, media = Counter[str](), Counter[str]()
        kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
        with PairWriter(part) as writer:
            for row, values in read_rows(task.arrow, task.rows, is_jsonl(task.shard.file)):
                found = self._record(task, row, values, media)
                if isinstance(found, PairRecord):
                    writer.add(found)
                    kind = f"{input_kind(found, 'query')} > {input_kind(found, 'target')}"
                    kinds[found.data_source][kind] += 1
                    wordless[found.data_source] += not (found.query.instruction or found.instruction)
                else:
                    skipped.append(row)
                    rejected += [found] if found else []
        return {
            "records": writer.rows,
            "by_source": {source: of.total() for source, of in kinds.items()},
            "rejected": rejected,
            "unused": len(skipped) - len(rejected),
            "skipped": skipped,
            "kinds": kinds,
            "without_instruction": +wordless,
            "media": media,
        }

    def _record(self, task: Task, row: int, values: Raw, media: Counter[str]) -> PairRecord | dict[str, Any] | None:
        """The record, the line of `rejected.jsonl`, or None for a row that is not used."""
        file, pair_id = task.shard.file, {}
        try:
            if isinstance(values, RowError):
                raise values
            if (
                values is None
                or (record := self._convert(RawRow(task.shard, row, values, self.store.media_root))) is None
            ):
                return None
            pair_id = {"pair_id": str(record.pair_id)}
            check_unicode(record)
            if row in task.repeated:
                raise RowError("pair_id", task.repeated[row])
            return self.store.put(record, media)
        except DataError as error:
            place = {"line": row + 1} if is_jsonl(file) else {"row": row}
            why = {"field": getattr(error, "field", ""), "reason": getattr(error, "reason", str(error))}
            return {"file": file, **place, **why, **pair_id}

    def _convert(self, raw: RawRow) -> PairRecord | None:
        try:
            return self.converter.convert(raw)
        except DataError:
            raise
        except UnicodeError as error:
            raise RowError("", f"holds a lone surrogate, which is no Unicode text ({error})") from error
        except OSError as error:
            raise RowError("", f"a file of this row cannot be read ({error})") from error
        except Exception as error:  # a fault of the converter, not of the data: named, and the job stops
            where = f"{self.converter.name} failed on {raw.shard.file}, row {raw.row}"
            raise EmbedRLError(f"the converter {where}: {type(error).__name__}: {error}") from error


def check_unicode(value: Any, name: str = "") -> None:
    """Raise RowError, naming the field, for a text of a record that holds a lone surrogate: json reads such."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(name, f"holds a lone surrogate, which is no Unicode text ({error})") from error
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            check_unicode(part, f"{name}[{index}]")
    elif isinstance(value, PairRecord | Item | Video):
        for key, part in vars(value).items():
            check_unicode(part, f"{name}.{key}".lstrip("."))
