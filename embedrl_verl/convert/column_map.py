# SPDX-License-Identifier: Apache-2.0
"""A column map: where a user's rows keep the fields of a pair record. YAML, or options of the command line.

```yaml
pair_id: id                                 # a column
query:
  images: meta.photos[0]                    # into structs and lists; a path, bytes, a struct of both, or a list of them
  text: {template: "{place}, {year}"}       # several columns in one text
target: {text: {value: a constant}}
negatives: {text: wrong_captions}           # optional: one map (lists in it are spread), or a list of maps
```
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from embedrl_verl.convert.converter import RowError, show
from embedrl_verl.data.schema import SIDES
from embedrl_verl.errors import ConfigError

RECORD_KEYS = ("pair_id", "data_source", "instruction", "query_id", "target_id")
ITEM_KEYS = ("text", "images", "video", "fps", "kind", "instruction", "tcot")
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
IN_BRACES = re.compile(r"\{\{|\}\}|\{(\s*[^{}!:\s][^{}!:]*)\}")


def load_column_map(path: str, columns: Sequence[str] = (), values: Sequence[str] = ()) -> dict[str, Any] | None:
    """The map of a YAML file, with KEY=COLUMN and KEY=TEXT of the command line over it; None if nothing is given."""
    plain: Any = {}
    if path:
        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable column map ({error})") from error
        if not isinstance(plain, dict):
            raise ConfigError(f"{path}: a column map is a mapping of fields to columns; got {show(plain)}")
    for texts, option in ((columns, "--column"), (values, "--value")):
        for text in texts:
            key, _, content = text.partition("=")
            if not key or not content:
                raise ConfigError(f"{option} takes KEY=..., as query.text=question; got {text!r}")
            head, _, name = key.partition(".")
            entry = content if option == "--column" else {"value": content}
            side = plain.get(head) or {}
            side = side if isinstance(side, dict) else {"text": side}
            plain[head] = {**side, name: entry} if name else entry
    return column_map(plain, path or "the command line") if plain else None


def column_map(plain: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The checked map: sides are mappings, negatives a list of them; an entry is a column, {"template": words} or
    {"value": constant}. `where` stands in errors."""
    _check_keys(plain, (*RECORD_KEYS, *SIDES, "negatives"), where)
    for side in SIDES:
        if side not in plain:
            raise ConfigError(f"{where}: {side} is missing; a pair needs both sides")
    negatives = plain.get("negatives") or []
    negatives = negatives if isinstance(negatives, list) else [negatives]
    return {
        **{key: _entry(plain[key], where, key) for key in RECORD_KEYS if key in plain},
        **{side: _fields(plain[side], where, side) for side in SIDES},
        "negatives": [_fields(item, where, f"negatives[{index}]") for index, item in enumerate(negatives)],
    }


def columns_of(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Field -> column, as {"query.text": "question"}, for messages; without those of negatives."""
    names = {key: column_of(mapping[key], key) for key in RECORD_KEYS if key in mapping}
    for side in SIDES:
        names |= {f"{side}.{key}": column_of(entry, f"{side}.{key}") for key, entry in mapping[side].items()}
    return names


def apply_map(
    mapping: Mapping[str, Any], row: Mapping[str, Any], names: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A row in the form of a pair record, and `names` (of `columns_of`) with those of its negatives."""
    values = {key: look_up(mapping[key], row) for key in RECORD_KEYS if key in mapping}
    for side in SIDES:
        values[side] = {key: look_up(entry, row) for key, entry in mapping[side].items()}
    negatives = values["negatives"] = []
    for index, fields in enumerate(mapping["negatives"]):
        columns = {key: column_of(entry, f"negatives[{index}].{key}") for key, entry in fields.items()}
        for one in _spread({key: look_up(entry, row) for key, entry in fields.items()}, columns):
            names = names | {f"negatives[{len(negatives)}].{key}": column for key, column in columns.items()}
            negatives.append(one)
    return values, names


def look_up(entry: Any, row: Mapping[str, Any]) -> Any:
    """What an entry of a map says of a row."""
    if isinstance(entry, str):
        return follow(row, entry)
    if "value" in entry:
        return entry["value"]
    return IN_BRACES.sub(lambda found: _word(row, found[1]) if found[1] else found[0][0], entry["template"])


def column_of(entry: Any, key: str) -> str:
    """How messages name an entry: the column or template, or the key of a constant."""
    return entry if isinstance(entry, str) else entry.get("template", key)


def follow(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `conversations[1].value`; a column of that very name wins; null stays null."""
    if path in row:
        return row[path]
    value: Any = row
    for step in STEP.finditer(path):
        if value is None:
            return None
        try:
            if step[2] and not isinstance(value, list):
                raise TypeError("only a list has entries")
            value = value[int(step[2]) if step[2] else step[1]]
        except (KeyError, IndexError, TypeError) as error:
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else show(value)
            place = path[: step.start()].rstrip(".") or "the row"
            raise RowError(path, f"{step[0]!r} is not in {place}, which has {found}") from error
    return value


def _word(row: Mapping[str, Any], name: str) -> str:
    value = follow(row, name)
    if isinstance(value, str | int | float):
        return str(value)
    raise RowError(name, f"a template takes strings and numbers; got {show(value)}")


def _spread(values: dict[str, Any], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One negative an entry where columns hold lists, of equal length."""
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    if len({len(value) for value in lists.values()}) > 1:
        found = ", ".join(f"{columns[key]} {len(value)}" for key, value in lists.items())
        raise RowError("negatives", f"the lists of a negative's fields must be equally long; got {found}")
    for entries in zip(*lists.values(), strict=True) if lists else [()]:
        yield {**values, **dict(zip(lists, entries, strict=True))}


def _check_keys(plain: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in plain:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _fields(plain: Any, where: str, side: str) -> dict[str, Any]:
    if isinstance(plain, str):  # `query: question` is its text
        plain = {"text": plain}
    if not isinstance(plain, Mapping) or not plain:
        keys = ", ".join(ITEM_KEYS)
        raise ConfigError(f"{where}: {side}: must be a column, or a mapping of {keys}; got {show(plain)}")
    _check_keys(plain, ITEM_KEYS, f"{where}: {side}")
    return {key: _entry(value, where, f"{side}.{key}") for key, value in plain.items()}


def _entry(plain: Any, where: str, key: str) -> Any:
    is_rate = key.endswith(".fps")
    if is_rate and isinstance(plain, int | float):
        plain = {"value": plain}
    kind, content = next(iter(plain.items())) if isinstance(plain, Mapping) and len(plain) == 1 else ("column", plain)
    if kind == "value" and is_rate:  # a number, which the command line gives as a text
        try:
            content = float(str(content))
        except ValueError:
            content = math.nan
        if not 0 < content < math.inf:
            raise ConfigError(f"{where}: {key}: a constant must be a positive number, as 2 or 0.5; got {show(plain)}")
    is_text = isinstance(content, str) and content != ""
    if kind == "template" and is_text and re.search("[{}]", IN_BRACES.sub("", content)):
        rule = "a template is words and columns in braces, as '{place}, {year}' ({{ and }} for braces themselves)"
        raise ConfigError(f"{where}: {key}: {rule}, without formats; got {content!r}")
    if kind == "column" and is_text:
        return content
    if (kind == "template" and is_text) or (kind == "value" and content is not None):
        return {kind: content}
    raise ConfigError(f"{where}: {key}: must be a column, {{value: ...}} or {{template: ...}}; got {show(plain)}")
