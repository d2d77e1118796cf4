# SPDX-License-Identifier: Apache-2.0
"""`--restart`: the removal of what an earlier conversion wrote to a folder, and of nothing else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from embedrl_verl.data.build import BUILD_FILE
from embedrl_verl.data.files import (
    CARD_FILE,
    CARD_TEXT_FILE,
    PART_PATTERN,
    REJECTED_FILE,
    WORK_FOLDER,
    begin_work,
    disk_errors,
    only_writer,
    read_object,
)
from embedrl_verl.errors import ConfigError


def remove_earlier(out: Path, needed: Iterable[Path], command: Sequence[str]) -> None:
    """Remove parts, cards, `rejected.jsonl` and `_work/` of an earlier conversion; stored media stay. Nothing goes if
    something of a person would, or something `needed` by the next conversion: ConfigError."""
    work, card = out / WORK_FOLDER, out / CARD_FILE
    state = next((file for file in (work / BUILD_FILE, card) if file.is_file()), None)
    if state is None:
        return  # `building` refuses what is there
    if not isinstance(read_object(state).get("sampling"), dict):  # no other command draws a sample
        raise ConfigError(f"{state} is not of a conversion; name another folder with --out")
    named = {part["file"] for part in read_object(card)["parts"]} if state == card else None
    parts = sorted(out.glob(PART_PATTERN))
    for part in parts:
        if not (re.fullmatch(r"part-\d{5,}\.parquet", part.name) if named is None else part.name in named):
            raise ConfigError(f"{part} was written by no conversion; move it away, or name another folder")
    files = [*parts, out / REJECTED_FILE, out / CARD_TEXT_FILE]
    going = {one.resolve() for one in (*files, work, card)}
    for path in needed:
        full = path.expanduser().resolve()
        if not going.isdisjoint((full, *full.parents)):
            way = "copy it to another folder, or name another folder with --out"
            raise ConfigError(f"--restart would remove {path}, which this conversion reads; {way}")
    with disk_errors(out):
        work.mkdir(exist_ok=True)
    with disk_errors(out), only_writer(out):
        begin_work(out, [*command, "--restart"])
        if card.is_file():
            os.replace(card, work / BUILD_FILE)  # unfinished from here on, whenever this is killed
        for path in files:
            path.unlink(missing_ok=True)
        shutil.rmtree(work)
