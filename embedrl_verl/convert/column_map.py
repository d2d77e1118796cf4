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
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from embedrl_verl.convert.converter import RowError, show
from embedrl_verl.errors import ConfigError

RECORD_KEYS = ("pair_id", "data_source", "instruction", "query_id", "target_id")
ITEM_KEYS = ("text", "images", "video", "fps", "kind", "instruction", "tcot")
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]|\.")


@dataclass(frozen=True)
class Reference:
    """How the entry `key` of the map is filled: `kind` is "column" (a path into the row), "template" or "value"."""

    key: str
    kind: str
    content: Any

    def look_up(self, row: Mapping[str, Any]) -> Any:
        if self.kind == "template":
            parts = string.Formatter().parse(self.content)
            return "".join(text + (_as_words(row, name) if name else "") for text, name, _, _ in parts)
        return follow(row, self.content) if self.kind == "column" else self.content

    @property
    def name(self) -> str:
        """For messages."""
        return self.key if self.kind == "value" else str(self.content)


Fields: TypeAlias = Mapping[str, Reference]


@dataclass(frozen=True)
class ColumnMap:
    """Field -> reference, of the record, of both sides, and of each negative."""

    record: Fields = field(default_factory=dict)
    query: Fields = field(default_factory=dict)
    target: Fields = field(default_factory=dict)
    negatives: tuple[Fields, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """For the data card: key -> reference, flat, in the form of the command line."""
        groups = (self.record, self.query, self.target, *self.negatives)
        every = [one for fields in groups for one in fields.values()]
        return {one.key: one.content if one.kind == "column" else {one.kind: one.content} for one in every}


def load_column_map(path: str | None, columns: Sequence[str] = (), values: Sequence[str] = ()) -> ColumnMap | None:
    """The map of a YAML file, with KEY=COLUMN and KEY=TEXT of the command line over it; None if nothing is given."""
    plain: dict[str, Any] = {}
    if path:
        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable column map ({error})") from error
        if not isinstance(plain, dict):
            raise ConfigError(f"{path}: a column map is a mapping of fields to columns; got {show(plain)}")
    for texts, option in ((columns, "--column"), (values, "--value")):
        for text in texts:
            key, equals, content = text.partition("=")
            if not equals or not key or not content:
                raise ConfigError(f"{option} takes KEY=..., as query.text=question; got {text!r}")
            _set(plain, key, content if option == "--column" else {"value": content}, f"{option} {text}")
    return column_map(plain, path or "the command line") if plain else None


def column_map(plain: Mapping[str, Any], where: str) -> ColumnMap:
    """A map from plain values, as YAML gives them; `where` stands in errors."""
    _check_keys(plain, (*RECORD_KEYS, "query", "target", "negatives"), where)
    for side in ("query", "target"):
        if side not in plain:
            raise ConfigError(f"{where}: {side} is missing; a pair needs both sides")
    negatives = plain.get("negatives") or []
    negatives = negatives if isinstance(negatives, list) else [negatives]
    return ColumnMap(
        record={key: _reference(plain[key], where, key) for key in RECORD_KEYS if key in plain},
        query=_fields(plain["query"], where, "query"),
        target=_fields(plain["target"], where, "target"),
        negatives=tuple(_fields(item, where, f"negatives[{index}]") for index, item in enumerate(negatives)),
    )


def follow(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `conversations[1].value`; a column of that very name wins; null stays null."""
    if path in row:
        return row[path]
    value: Any = row
    done = ""
    for match in STEP.finditer(path):
        key, index = match.group(1), match.group(2)
        if key is None and index is None:
            continue
        if value is None:
            return None
        try:
            if key is None and not isinstance(value, list):
                raise TypeError("only a list has entries")
            value = value[key] if key is not None else value[int(index)]
        except (KeyError, IndexError, TypeError) as error:
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else show(value)
            raise RowError(path, f"{match.group(0)!r} is not in {done or 'the row'}, which has {found}") from error
        done = path[: match.end()]
    return value


def _as_words(row: Mapping[str, Any], name: str) -> str:
    value = follow(row, name)
    if isinstance(value, str | int | float):
        return str(value)
    raise RowError(name, f"a template takes strings and numbers; got {show(value)}")


def _check_keys(plain: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in plain:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")


def _fields(plain: Any, where: str, side: str) -> Fields:
    if isinstance(plain, str):  # `query: question` is its text
        plain = {"text": plain}
    if not isinstance(plain, Mapping) or not plain:
        keys = ", ".join(ITEM_KEYS)
        raise ConfigError(f"{where}: {side}: must be a column, or a mapping of {keys}; got {show(plain)}")
    _check_keys(plain, ITEM_KEYS, f"{where}: {side}")
    return {key: _reference(value, where, f"{side}.{key}") for key, value in plain.items()}


def _reference(plain: Any, where: str, key: str) -> Reference:
    if key.endswith((".kind", ".fps")) and isinstance(plain, int | float):
        plain = {"value": plain}
    if isinstance(plain, str):
        plain = {"column": plain}
    kind, content = next(iter(plain.items())) if isinstance(plain, Mapping) and len(plain) == 1 else ("", None)
    if kind == "value" and content is not None:
        return Reference(key, kind, _constant(content, where, key))
    if kind in ("column", "template") and isinstance(content, str) and content:
        if kind == "template":
            _check_template(content, f"{where}: {key}")
        return Reference(key, kind, content)
    raise ConfigError(f"{where}: {key}: must be a column, {{value: ...}} or {{template: ...}}; got {show(plain)}")


def _constant(value: Any, where: str, key: str) -> Any:
    """A constant as its field has it: fps is a number, which the command line gives as a text."""
    if not key.endswith(".fps"):
        return value
    try:
        rate = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(f"{where}: {key}: a constant must be a positive number, as 2 or 0.5; got {show(value)}")
    return rate


def _check_template(template: str, where: str) -> None:
    """A template is nothing but words and {column}s."""
    rule = "a template is words and columns in braces, as '{place}, {year}' ({{ and }} for braces themselves)"
    rule = f"{where}: {rule}; got {template!r}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{rule}: {error}") from error
    for _, name, spec, conversion in parts:
        extra = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        if name is not None and not name.strip():
            raise ConfigError(f"{rule}, where a column's name is empty")
        if name is not None and re.match(r"\d+(?:[.\[]|$)", name):
            raise ConfigError(f"{rule}, where {name!r} is a number; name the column")
        if extra:
            raise ConfigError(f"{rule}; values are put in as they are, leave out {extra!r}")


def _set(plain: dict[str, Any], key: str, content: Any, where: str) -> None:
    """Set `query.text` and the like in a nested mapping."""
    head, _, rest = key.partition(".")
    if not rest:
        plain[head] = content
        return
    inner = plain.setdefault(head, {})
    if isinstance(inner, str):
        inner = plain[head] = {"text": inner}
    if not isinstance(inner, dict):
        raise ConfigError(f"{where}: {head} is {show(inner)} and has no fields")
    _set(inner, rest, content, where)
