# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of an export, from `card.md.jinja`.

It says what is known and nothing else: what a missing `training.json` would have told is "unknown". Values pass through
`public_text`, so no path of the machine is published, and cannot break the table they stand in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from embedrl_verl.export.checkpoint import Checkpoint
from embedrl_verl.export.record import public_model, public_text

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def render_card(found: Checkpoint, *, name: str, base_model: str | None, **facts: Any) -> str:
    """The text of README.md.

    Args:
        found: what was exported, with what its run says about itself.
        name: of the exported folder.
        base_model: name or path of the model that training began with; None = unknown.
        facts: the other values that the template names at its top.
    """
    embedder = found.kind == "embedder"
    front: dict[str, Any] = {} if base_model is None else {"base_model": public_model(base_model)}
    front |= {
        "library_name": "sentence-transformers" if embedder else "transformers",
        "pipeline_tag": "sentence-similarity" if embedder else "image-text-to-text",
        "tags": ["embedrl-verl", "multimodal", "retrieval"],
    }
    front["tags"] += ["sentence-transformers", "feature-extraction"] if embedder else ["reinforcement-learning"]
    # Markdown, not HTML: nothing is escaped but what the filters change.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"line": _line, "cell": _cell}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        kind=found.kind,
        record=found.record,
        step=found.step,
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        base_model=front.get("base_model"),
        name=name,
        **facts,
    )


def _line(value: object) -> str:
    """One line of public text."""
    return re.sub(r"\s+", " ", public_text(value))


def _cell(value: object) -> str:
    """Public text that stays within a table's cell."""
    return _line(value).replace("|", "\\|")
