# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.config.docs docs/configuration.md`: writes the tables of keys anew from the YAML comments.

A comment right above a key is its meaning; a section with a comment gets a table of its own. What a person wrote stays:
everything above the line MARKER.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

MARKER = (
    "<!-- Generated from the YAML comments from here on: python -m embedrl_verl.config.docs docs/configuration.md -->"
)
FILES = {
    "egrl_trainer.yaml": "EG-RL: `egrl_trainer.yaml`",
    "embedder_trainer.yaml": "Stage 1 (`python -m embedrl_verl.stage1`): `embedder_trainer.yaml`",
    "platform/cpu.yaml": "`platform=cpu`",
}
NOT_SETTINGS = ("hydra", "defaults")


@dataclass(frozen=True)
class Key:
    """A key of a file with its dotted path. `value` as written; "" is a section."""

    path: str
    value: str
    comment: str


def keys_of(text: str) -> list[Key]:
    """The keys of a YAML file whose sections are indented by two spaces, in order."""
    found: list[Key] = []
    parents: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        words = re.fullmatch(r"( *)(?:# ?(?P<comment>.*)|(?P<key>[\w]+):(?: (?P<value>.+))?)", line)
        if words is None or (words["comment"] is None and words["key"] is None):
            comment = []
        elif words["comment"] is not None:
            comment.append(words["comment"])
        else:
            parents = [*parents[: len(words[1]) // 2], words["key"]]
            if parents[0] not in NOT_SETTINGS:
                found.append(Key(".".join(parents), words["value"] or "", " ".join(comment)))
            comment = []
    return found


def tables(name: str) -> str:
    """A file's keys as tables; a key of a section without a comment stands in the table of the section above it."""
    keys = keys_of(files("embedrl_verl.config").joinpath(name).read_text("utf-8"))
    on_cpu = {key.path: key.value for key in keys_of(_cpu()) if key.value} if name == "egrl_trainer.yaml" else {}
    heads = {key.path: key.comment for key in keys if not key.value and (key.comment or "." not in key.path)}
    rows: dict[str, list[str]] = {head: [] for head in heads}
    for key in keys:
        if key.value:
            above = max((head for head in heads if key.path.startswith(f"{head}.")), key=len)
            cpu = on_cpu.get(key.path, key.value)
            default = f"`{key.value}`" if cpu == key.value else f"`{key.value}`; `{cpu}` with `platform=cpu`"
            meaning = key.comment.replace("<", "&lt;").replace("|", "\\|")
            rows[above].append(f"| `{key.path.removeprefix(f'{above}.')}` | {default} | {meaning} |")
    parts = [f"## {FILES[name]}"]
    for head, lines in rows.items():
        if lines:
            parts += [f"### `{head}`", *([heads[head]] if heads[head] else [])]
            parts.append("\n".join(["| key | default | meaning |", "|---|---|---|", *lines]))
    return "\n\n".join(parts)


def _cpu() -> str:
    return files("embedrl_verl.config").joinpath("platform/cpu.yaml").read_text("utf-8")


def document(written: str) -> str:
    """The document anew: the head of what is `written`, then the tables."""
    head = written.partition(MARKER)[0].rstrip()
    return "\n\n".join([head, MARKER, *map(tables, FILES)]) + "\n"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(document(page.read_text("utf-8")), encoding="utf-8")
