# SPDX-License-Identifier: Apache-2.0
"""Your own data as pair records: jsonl, parquet, a folder of `datasets`, or a hub id; docs/data.md has the column map.

python data_preprocess/generic.py --input photos.jsonl --out data/photos --column query.images=photo \\
    --column target.text=caption --value 'instruction=Find the caption of this photo.'

Without a column map a row has the fields of a pair record itself: `query` and `target`, each a text or an object with
text, images, video, kind, instruction, tcot; optional pair_id, data_source, instruction, query_id, target_id,
negatives. So our own parquet files can be read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from embedrl_verl.convert.column_map import ITEM_KEYS, RECORD_KEYS, ColumnMap, Fields, load_column_map
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard, as_images, as_text, option, show
from embedrl_verl.convert.inputs import InputRoot, natural_key
from embedrl_verl.data.files import CARD_FILE, COMMAND_FILE, REJECTED_FILE, WORK_FOLDER
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ConfigError, DataError

PATTERNS = ("**/*.parquet", "**/*.jsonl", "**/*.jsonl.gz", "**/data-*.arrow")
FASTEST = 1e6


@dataclass(frozen=True)
class Generic(Converter):
    columns: str = option("", "column map in YAML")
    column: tuple[str, ...] = option(
        (), "KEY=COLUMN, one entry of the map, as query.text=question or target.images=photo; may be given again"
    )
    value: tuple[str, ...] = option((), "KEY=TEXT, a constant, as 'instruction=Find the caption of this photo.'")
    source: str = option("", "data source of all rows; without it what the rows say, else the input's name")
    pattern: str = option("", "files of the folder to read, as train/*.parquet")

    name = "generic"

    mapping: ClassVar[ColumnMap | None] = None  # of the instance: read once, and sent to the workers

    def __post_init__(self) -> None:
        super().__post_init__()
        mapping = load_column_map(self.columns, self.column, self.value)
        if mapping is not None and "data_source" in mapping.record and self.source:
            raise ConfigError("the column map says data_source, and --source too; leave one out")
        object.__setattr__(self, "mapping", mapping)

    @property
    def settings(self) -> dict[str, Any]:
        plain = {} if self.mapping is None else self.mapping.as_plain()
        return {"source": self.source, "pattern": self.pattern, **{f"columns.{key}": plain[key] for key in plain}}

    def shards(self, root: InputRoot) -> list[Shard]:
        patterns = (self.pattern,) if self.pattern else PATTERNS
        names = root.files(*patterns) if self.pattern else not_ours(root, root.files(*patterns))
        if not names:
            raise DataError(f"no file fits {', '.join(patterns)}; the input must be a file or folder of such files")
        default, source = name_of(root.location), self.source
        if not source and self.mapping is not None:
            said = self.mapping.record.get("data_source")
            source = default if said is None else str(said.content) if said.kind == "value" else ""
        return [Shard(name, source, note=default) for name in sorted(names, key=natural_key)]

    def convert(self, row: RawRow) -> PairRecord:
        values, mapping = row.values, self.mapping
        if mapping is not None:
            texts = {key: id_text(one.look_up(values), one.name) for key, one in mapping.record.items()}
            query = mapped_item(look_up(mapping.query, row), mapping.query, "query")
            target = mapped_item(look_up(mapping.target, row), mapping.target, "target")
            spreads = [spread(one, row, f"negatives[{index}]") for index, one in enumerate(mapping.negatives)]
            negatives = [item for items in spreads for item in items]
        elif "query" not in values and "target" not in values:
            raise RowError(
                "",
                "has neither query nor target; say which columns they are with --column query.text=..., --column "
                f"target.text=..., or a map (--columns). The row has {', '.join(values) or 'none'}",
            )
        else:
            texts = {key: row.text(key, "") for key in RECORD_KEYS if key != "pair_id"}
            texts["pair_id"] = id_text(values.get("pair_id"), "pair_id")
            query, target = own_item(row.value("query"), "query"), own_item(row.value("target"), "target")
            given = values.get("negatives") or []
            if not isinstance(given, list):
                raise RowError("negatives", f"must be a list; got {show(given)}")
            negatives = [own_item(item, f"negatives[{index}]") for index, item in enumerate(given)]
        source = self.source or texts.get("data_source") or row.shard.note
        texts |= {"data_source": source, "pair_id": texts.get("pair_id") or row.pair_id(source)}
        return PairRecord(**{"instruction": "", **texts}, query=query, target=target, negatives=tuple(negatives))


def own_item(value: Any, side: str) -> Item:
    if isinstance(value, str):
        return Item(text=value)
    if not isinstance(value, Mapping):
        raise RowError(side, f"must be a text or an object; got {show(value)}")
    for key in value:
        if key not in ITEM_KEYS:
            raise RowError(f"{side}.{key}", f"unknown field; known are {', '.join(ITEM_KEYS)}")
    return item_of(value, lambda key: f"{side}.{key}", side)


def mapped_item(values: Mapping[str, Any], fields: Fields, side: str) -> Item:
    return item_of(values, lambda key: fields[key].name, side)


def look_up(fields: Fields, row: RawRow) -> dict[str, Any]:
    return {key: reference.look_up(row.values) for key, reference in fields.items()}


def spread(fields: Fields, row: RawRow, side: str) -> Iterable[Item]:
    """The negatives of one map: where its columns hold lists of equal length, one negative an entry; empty ones go."""
    values = look_up(fields, row)
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    lengths = {len(value) for value in lists.values()}
    if len(lengths) > 1:
        found = ", ".join(f"{fields[key].name} {len(value)}" for key, value in lists.items())
        raise RowError(side, f"the lists of a negative's fields must be equally long; got {found}")
    for index in range(lengths.pop() if lengths else 1):
        one = {key: value[index] if key in lists else value for key, value in values.items()}
        item = mapped_item(one, fields, f"{side}, entry {index}")
        if not item.is_empty:
            yield item


def item_of(values: Mapping[str, Any], name: Callable[[str], str], side: str) -> Item:
    """A side from raw values by field; `name` gives the column of a field."""

    def text(key: str) -> str:
        value = values.get(key)
        return "" if value is None else value if isinstance(value, str) else as_text(value, name(key))

    images, video = values.get("images"), values.get("video")
    try:
        return Item(
            text=text("text"),
            images=as_images(images, name("images")) if images is not None else (),
            video=video_of(video, values.get("fps"), name) if video is not None else None,
            instruction=text("instruction"),
            kind=text("kind") or None,
            tcot=text("tcot"),
        )
    except DataError as error:
        raise of_field(error, side) from error


def of_field(error: DataError, field: str) -> RowError:
    return error if isinstance(error, RowError) else RowError(field, str(error))


def video_of(value: Any, fps: Any, name: Callable[[str], str]) -> Video | None:
    of_struct = fps is None and isinstance(value, Mapping)
    if isinstance(value, Mapping):  # {frames, path, fps}, as in our own files; or one struct of a path
        if value.get("bytes"):
            raise RowError(name("video"), "holds the bytes of a video file; write them to a file, and give its path")
        fps = value.get("fps") if fps is None else fps
        value = value.get("frames") or value.get("path")
    if value is None or value == "":
        return None
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or abs(fps) > FASTEST):
        raise RowError(f"{name('video')}.fps" if of_struct else name("fps"), f"must be a number; got {show(fps)}")
    if value == []:
        raise RowError(name("video"), "has no frames")
    rate = None if fps is None else float(fps)
    try:
        if isinstance(value, list):
            return Video(frames=as_images(value, name("video")), fps=rate)
        return Video(path=as_text(value, name("video")), fps=rate)
    except DataError as error:
        raise of_field(error, name("video")) from error


def id_text(value: Any, name: str) -> str:
    """A text; null is "", and ids are often numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value is None else as_text(value, name)


def name_of(location: str) -> str:
    """A data source's name from a path or hub id: lower case, letters, digits and _."""
    name = PurePosixPath(location.split("@")[0].rstrip("/")).name
    return re.sub(r"[^a-z0-9]+", "_", name.split(".")[0].lower()).strip("_") or "own"


def not_ours(root: InputRoot, names: list[str]) -> list[str]:
    """The files without hidden ones, and without what data commands write beside pair records. Raises DataError if a
    folder of pair records is unfinished."""
    for name in root.files(f"**/{WORK_FOLDER}/{COMMAND_FILE}"):
        path = root.path(name)
        raise DataError(
            f"{path.parent.parent} is unfinished (it has {WORK_FOLDER}/); finish it with: {path.read_text().strip()}"
        )
    made = {PurePosixPath(card).parent for card in root.files(f"**/{CARD_FILE}")}
    paths = [PurePosixPath(name) for name in names]
    hidden = {path for path in paths if any(part.startswith(".") for part in path.parts)}
    reports = {folder / REJECTED_FILE for folder in made}
    return [str(path) for path in paths if path not in hidden | reports]


if __name__ == "__main__":
    sys.exit(convert_main(Generic, __doc__))
