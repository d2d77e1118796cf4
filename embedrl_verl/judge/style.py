# SPDX-License-Identifier: Apache-2.0
"""Styles of the judge's prompt: templates as data files, checked when they are loaded.

A style is one YAML file in `templates/`. Its keys:

    style        its name
    shows        "text": the whole T-CoT; "answer": what stands in its <answer>
    one_line     true: white space in a shown text becomes single spaces, so that it cannot start a line of its own; and
                 what parts number and text in `candidate` becomes a space, too
    delimiters   names of tags that the template uses; tags of these names in a shown text are broken up
    join         what stands between blocks
    head         blocks before the images; may use $task and $instruction. One that comes out empty is left out
    instruction  a line with $value, the instruction of the row's input
    body         blocks after the images; may use $candidates
    candidates   what stands between candidates
    candidate    one candidate: $number, $text
    sides        by the judged row's side: `task`; `images`, a line before the images where there are any; `judged`, the
                 last block, with $text

All rollouts of a prompt share everything before the judged text, so `judged` has the only part that differs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import yaml

from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import SIDES, Side
from embedrl_verl.tcot.styles import fill

JUDGE_STYLES = ("paper", "compact")
_SHOWN = ("text", "answer")


@dataclass(frozen=True)
class SideTemplate:
    """What a style says to judge a row of one side; see the module."""

    task: str
    images: str
    judged: str


@dataclass(frozen=True)
class JudgeStyle:
    """A checked style; see the module for its fields."""

    style: str
    shows: str
    one_line: bool
    delimiters: tuple[str, ...]
    join: str
    head: tuple[str, ...]
    instruction: str
    body: tuple[str, ...]
    candidates: str
    candidate: str
    sides: Mapping[Side, SideTemplate]

    @property
    def separators(self) -> tuple[str, ...]:
        """What parts number and text in `candidate`."""
        return tuple(part for part in re.split(r"\$(?:number|text)", self.candidate) if part.strip())


@functools.cache
def load_judge_style(name: str) -> JudgeStyle:
    """A style that ships with the package.

    Raises:
        ConfigError: an unknown name, or a malformed file.
    """
    if name not in JUDGE_STYLES:
        raise ConfigError(f"the judge's style must be one of {', '.join(JUDGE_STYLES)}; got {name!r}")
    file = resources.files("embedrl_verl.judge").joinpath("templates").joinpath(f"{name}.yaml")
    return parse_judge_style(file.read_text(encoding="utf-8"), source=f"{name}.yaml")


def parse_judge_style(text: str, *, source: str) -> JudgeStyle:
    """Read and check a style.

    Raises:
        ConfigError: not YAML, a key missing, unknown or of the wrong type, or an unknown placeholder; the message names
            `source`.
    """
    try:
        style = _style_of(yaml.safe_load(text))
        for block in style.head:
            fill(block, task="", instruction="")
        for block in style.body:
            fill(block, candidates="")
        fill(style.instruction, value="")
        fill(style.candidate, number="", text="")
        for template in style.sides.values():
            fill(template.judged, text="")
    except yaml.YAMLError as error:
        raise ConfigError(f"template {source}: not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"template {source}: {error}") from error
    for where, block in (("candidate", style.candidate), *((s, style.sides[s].judged) for s in SIDES)):
        if "$text" not in block:
            raise ConfigError(f"template {source}: {where} must show $text; got {block!r}")
    return style


def _style_of(raw: Any) -> JudgeStyle:
    values = _mapping(raw, "the file", [field.name for field in fields(JudgeStyle)])
    if values["shows"] not in _SHOWN or not isinstance(values["one_line"], bool):
        raise ConfigError(
            f"shows must be one of {', '.join(_SHOWN)} and one_line true or false; "
            f"got {values['shows']!r}, {values['one_line']!r}"
        )
    sides = _mapping(values["sides"], "sides", SIDES)
    names = ("style", "join", "instruction", "candidates", "candidate")
    return JudgeStyle(
        **{key: _text(values[key], key) for key in names},
        shows=values["shows"],
        one_line=values["one_line"],
        delimiters=_texts(values["delimiters"], "delimiters"),
        head=_texts(values["head"], "head"),
        body=_texts(values["body"], "body"),
        sides={side: _side_of(sides[side], f"sides.{side}") for side in SIDES},
    )


def _side_of(raw: Any, where: str) -> SideTemplate:
    keys = ("task", "images", "judged")
    values = _mapping(raw, where, keys)
    return SideTemplate(**{key: _text(values[key], f"{where}.{key}") for key in keys})


def _mapping(raw: Any, where: str, keys: Any) -> dict[Any, Any]:
    if not isinstance(raw, dict) or set(raw) != set(keys):
        found = sorted(map(str, raw)) if isinstance(raw, dict) else repr(raw)
        raise ConfigError(f"{where} must have exactly the keys {', '.join(keys)}; got {found}")
    return raw


def _texts(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise ConfigError(f"{where} must be a list of strings; got {raw!r}")
    return tuple(_text(value, where) for value in raw)


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise ConfigError(f"{where} must be a string; got {raw!r}")
    return raw
