# SPDX-License-Identifier: Apache-2.0
"""A file of records that the report tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedrl_verl.cli import main
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs
from tests.report.inputs import noise, png, tcot


@pytest.fixture
def records() -> list[PairRecord]:
    """Images, a page and a clip, sound ones; then one with words for a T-CoT, a broken and a bare one."""

    def pair(name: str, source: str, query: Item, target: Item, negatives: tuple[Item, ...] = ()) -> PairRecord:
        return PairRecord(name, source, "Find it.", query, target, f"id of {name}", negatives)

    picture, page = png(noise(0, 400, 200)), png(noise(1, 300, 424))
    frames = tuple(png(noise(10 + number, 56, 56)) for number in range(4))
    answer = Item("a red bus", tcot=tcot({"text_keywords": ["red bus"]}))
    boxes = tcot({"bbox_2d": [[100, 200, 500, 800], [600, 0, 1000, 500]]})
    return [
        pair("image", "vqa", Item("what drives?", (picture,), tcot=boxes), answer, (Item("a blue car"),)),
        pair("page", "docs", answer, Item("", (page,), kind="page", tcot=tcot({"bbox_2d": [0, 0, 1000, 100]}))),
        pair("clip", "videos", Item(video=Video(frames, fps=2.0), tcot=tcot({"key_frames": [4, 2]})), answer),
        pair("words", "odd", Item("a question", tcot="words"), answer),
        pair("broken", "vqa", Item("where?", ("gone.png",)), answer),
        pair("bare", "text", Item("a question"), Item("an answer")),
    ]


@pytest.fixture
def file(tmp_path: Path, records: list[PairRecord]) -> Path:
    write_pairs(records, tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


@pytest.fixture
def embedrl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`embedrl("data", "show", FILE)`: exit code of the command, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main([str(word) for word in words])
