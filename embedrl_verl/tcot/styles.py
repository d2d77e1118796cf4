# SPDX-License-Identifier: Apache-2.0
"""Prompt styles: templates as data files, checked when they are loaded.

A style is one YAML file in `templates/`. Its keys:

    style       its name
    layout      blocks of the prompt in order; one that comes out empty is left out
    join        what stands between blocks
    instruction, text, gold     a line with $value: the item's instruction and text, and the answer where it is given
    evidence    how to write the evidence, by evidence key; may use $units, $num_images, $num_frames
    units       units of boxes, by convention
    example     one worked example: $number, $input, $output
    kinds       by input kind: `task`, and `examples` with `input`, `thinking` (with $evidence where the JSON object
                goes), `evidence` (boxes in 0..1000, whatever the family), `rethink`, `answer`, and `image_sizes`
                ([width, height] in pixels) or `num_frames` of the imagined input

A layout may use $task, $evidence, $instruction, $text, $gold, $examples. Every example, in the units of every family,
must be a well-formed T-CoT with the evidence that its kind calls for.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import yaml

from embedrl_verl.errors import ConfigError
from embedrl_verl.families import BOX_CONVENTIONS, BoxConvention
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, EVIDENCE_KEYS, INPUT_KINDS, InputKind
from embedrl_verl.tcot.boxes import RELATIVE_SIZE
from embedrl_verl.tcot.form import format_reward
from embedrl_verl.tcot.parse import parse_tcot

STYLES = ("paper", "compact")


@dataclass(frozen=True)
class Example:
    """A worked example; see the module for its fields."""

    input: str
    thinking: str
    evidence: Mapping[str, Any]
    rethink: str
    answer: str
    image_sizes: tuple[tuple[int, int], ...] = ()
    num_frames: int | None = None

    def tcot_text(self, convention: BoxConvention) -> str:
        """The example's T-CoT, boxes in the units of the convention."""
        evidence = dict(self.evidence)
        if convention == "absolute" and "bbox_2d" in evidence:
            evidence["bbox_2d"] = [self._absolute(box) for box in evidence["bbox_2d"]]
        thinking = fill(self.thinking, evidence=json.dumps(evidence, ensure_ascii=False))
        return f"<thinking>{thinking}</thinking>\n<rethink>{self.rethink}</rethink>\n<answer>{self.answer}</answer>"

    def _absolute(self, box: Any) -> Any:
        if isinstance(box, dict):
            return {**box, "box": self._scaled(box["box"], box["image"])}
        return self._scaled(box, 1)

    def _scaled(self, box: list[int], image: int) -> list[int]:
        return [
            round(value / RELATIVE_SIZE * size)
            for value, size in zip(box, self.image_sizes[image - 1] * 2, strict=True)
        ]


@dataclass(frozen=True)
class KindTemplate:
    """What a style says of one input kind."""

    task: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class PromptStyle:
    """A checked style; see the module for its fields."""

    style: str
    layout: tuple[str, ...]
    join: str
    instruction: str
    text: str
    gold: str
    evidence: Mapping[str, str]
    units: Mapping[str, str]
    example: str
    kinds: Mapping[str, KindTemplate]

    def render(
        self,
        kind: InputKind,
        convention: BoxConvention,
        *,
        instruction: str = "",
        text: str = "",
        gold_answer: str | None = None,
        num_images: int = 0,
        num_frames: int = 0,
        few_shot: bool = True,
    ) -> str:
        """The prompt's text for one input; values are put in as they are and never read as templates."""
        template = self.kinds[kind]
        examples = template.examples if few_shot else ()
        values = {
            "task": template.task,
            "evidence": fill(
                self.evidence[EVIDENCE_KEY_OF_KIND[kind]],
                units=self.units[convention],
                num_images=str(num_images),
                num_frames=str(num_frames),
            ),
            "instruction": fill(self.instruction, value=instruction) if instruction else "",
            "text": fill(self.text, value=text) if text else "",
            "gold": fill(self.gold, value=gold_answer) if gold_answer else "",
            "examples": self.join.join(
                fill(self.example, number=str(number), input=example.input, output=example.tcot_text(convention))
                for number, example in enumerate(examples, start=1)
            ),
        }
        blocks = (fill(block, **values).strip() for block in self.layout)
        return self.join.join(block for block in blocks if block)


def fill(template: str, **values: str) -> str:
    """Put values in the place of $names, once: a "$" in a value stays.

    Raises:
        ConfigError: a name without a value, or a lone "$" in the template.
    """
    try:
        return string.Template(template).substitute(values)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"a template may use {', '.join('$' + name for name in values)}, and $$ for a dollar; "
            f"got {error} in {template!r}"
        ) from error


@functools.cache
def load_style(name: str) -> PromptStyle:
    """A style that ships with the package.

    Raises:
        ConfigError: an unknown name, or a malformed file.
    """
    if name not in STYLES:
        raise ConfigError(f"prompt style must be one of {', '.join(STYLES)}; got {name!r}")
    file = resources.files("embedrl_verl.tcot").joinpath("templates").joinpath(f"{name}.yaml")
    return parse_style(file.read_text(encoding="utf-8"), source=f"{name}.yaml")


def parse_style(text: str, *, source: str) -> PromptStyle:
    """Read and check a style.

    Raises:
        ConfigError: not YAML, a key missing, unknown or of the wrong type, a kind missing, an unknown placeholder, or
            an example that is not a well-formed T-CoT; the message names `source`.
    """
    try:
        style = _style_of(yaml.safe_load(text))
        for kind in INPUT_KINDS:
            for convention in BOX_CONVENTIONS:
                style.render(kind, convention, instruction="i", text="t", gold_answer="g")
                for example in style.kinds[kind].examples:
                    _check_example(example, kind, convention)
    except yaml.YAMLError as error:
        raise ConfigError(f"template {source}: not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"template {source}: {error}") from error
    return style


def _check_example(example: Example, kind: InputKind, convention: BoxConvention) -> None:
    tcot = parse_tcot(
        example.tcot_text(convention), num_frames=example.num_frames, num_images=len(example.image_sizes) or None
    )
    required = EVIDENCE_KEY_OF_KIND[kind]
    if not format_reward(tcot, required):
        problems = "; ".join(tcot.problems) or f"no {required}"
        raise ConfigError(f"an example of {kind} must be a well-formed T-CoT with {required}: {problems}")


def _style_of(raw: Any) -> PromptStyle:
    values = _mapping(raw, "the file", [field.name for field in fields(PromptStyle)])
    texts = {key: _text(values[key], key) for key in ("style", "join", "instruction", "text", "gold", "example")}
    layout = tuple(_text(block, "layout") for block in _list(values["layout"], "layout"))
    kinds = _mapping(values["kinds"], "kinds", INPUT_KINDS)
    return PromptStyle(
        **texts,
        layout=layout,
        evidence=_texts(values["evidence"], "evidence", EVIDENCE_KEYS),
        units=_texts(values["units"], "units", BOX_CONVENTIONS),
        kinds={kind: _kind_of(kinds[kind], kind) for kind in INPUT_KINDS},
    )


def _kind_of(raw: Any, kind: str) -> KindTemplate:
    values = _mapping(raw, kind, ("task", "examples"))
    examples = tuple(
        _example_of(example, f"{kind}.examples") for example in _list(values["examples"], f"{kind}.examples")
    )
    return KindTemplate(_text(values["task"], f"{kind}.task"), examples)


def _example_of(raw: Any, where: str) -> Example:
    required, optional = ("input", "thinking", "evidence", "rethink", "answer"), ("image_sizes", "num_frames")
    values = _mapping(raw, where, required, optional)
    texts = {key: _text(values[key], f"{where}.{key}") for key in ("input", "thinking", "rethink", "answer")}
    sizes = tuple(
        tuple(size) for size in _list(values.get("image_sizes", []), f"{where}.image_sizes") if _is_size(size)
    )
    if len(sizes) != len(values.get("image_sizes", [])):
        raise ConfigError(
            f"{where}.image_sizes must be [width, height] pairs of positive integers; got {values['image_sizes']}"
        )
    num_frames = values.get("num_frames")
    if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
        raise ConfigError(f"{where}.num_frames must be a positive integer; got {num_frames!r}")
    evidence = _mapping(values["evidence"], f"{where}.evidence", (), EVIDENCE_KEYS)
    for box in _list(evidence.get("bbox_2d", []), f"{where}.evidence.bbox_2d"):
        _check_box(box, len(sizes), f"{where}.evidence.bbox_2d")
    return Example(**texts, evidence=evidence, image_sizes=sizes, num_frames=num_frames)


def _check_box(raw: Any, num_images: int, where: str) -> None:
    """A box in 0..1000, or {image, box}."""
    box, image = raw, 1
    if isinstance(raw, dict):
        values = _mapping(raw, where, ("image", "box"))
        box, image = values["box"], values["image"]
    is_box = isinstance(box, list) and len(box) == 4 and all(type(v) is int and 0 <= v <= RELATIVE_SIZE for v in box)
    if not is_box or type(image) is not int or not 1 <= image <= num_images:
        raise ConfigError(
            f"{where} must be boxes of four integers in 0..{RELATIVE_SIZE} in one of the {num_images} images of "
            f"image_sizes; got {raw!r}"
        )


def _is_size(raw: Any) -> bool:
    return isinstance(raw, list) and len(raw) == 2 and all(type(side) is int and side > 0 for side in raw)


def _mapping(raw: Any, where: str, required: Any, optional: Any = ()) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a mapping; got {raw!r}")
    missing = [key for key in required if key not in raw]
    unknown = [key for key in raw if key not in (*required, *optional)]
    if missing or unknown:
        raise ConfigError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    return raw


def _texts(raw: Any, where: str, keys: Any) -> dict[str, str]:
    return {key: _text(value, f"{where}.{key}") for key, value in _mapping(raw, where, keys).items()}


def _list(raw: Any, where: str) -> list[Any]:
    if not isinstance(raw, list):
        raise ConfigError(f"{where} must be a list; got {raw!r}")
    return raw


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not raw:
        raise ConfigError(f"{where} must be a non-empty string; got {raw!r}")
    return raw
