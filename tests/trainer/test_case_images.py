# SPDX-License-Identifier: Apache-2.0
"""Cases drawn during training: the same sides each time, boxes where the T-CoT points, in the run's own log."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.trainer.case_images import TAG, CaseImages

BOXED = '<thinking>{"bbox_2d":[0,0,500,1000]}</thinking><rethink>ok</rethink><answer>left</answer>'
FRAMED = '<thinking>{"key_frames":[2]}</thinking><rethink>ok</rethink><answer>second</answer>'


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    """Two pairs of pictures, and one of a clip in another source."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (64, 32), "white").save(tmp_path / name)
    records = [
        PairRecord("a", "birds", "Find it.", Item(images=("0.png",)), Item(text="a heron")),
        PairRecord("b", "birds", "Find it.", Item(text="an owl"), Item(images=("1.png",))),
        PairRecord("c", "clips", "Find it.", Item(video=Video(("0.png", "1.png"), fps=1.0)), Item(text="it flies")),
    ]
    return SimpleNamespace(
        pair_sources=[one.data_source for one in records],
        record=records.__getitem__,
        settings=MediaConfig(),
        family="qwen2_vl",
        media_root=str(tmp_path),
    )


def cases(dataset: Any, count: int = 2, loggers: tuple[str, ...] = ("tensorboard",)) -> CaseImages:
    return CaseImages(count, dataset, EvidenceConfig(), loggers, ("project", "run"))


def row(pair: str, side: int, text: str, session: int = 0) -> Any:
    return SimpleNamespace(pair_id=pair, side=side, session=session, tcot=SimpleNamespace(text=text))


def images(folder: Path) -> dict[str, list[Any]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {name: events.Images(name) for name in events.Tags()["images"]}


def test_the_same_sides_of_each_source_are_drawn_in_every_validation(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "log"))
    drawn = cases(dataset)
    rows = [row("b", 1, BOXED), row("a", 0, "second", session=1), row("a", 0, BOXED), row("a", 1, "text")]
    drawn.note([*rows, row("c", 0, FRAMED)])
    drawn.log(0)
    drawn.note([row("a", 0, BOXED)])  # of the others nothing came back
    drawn.log(20)
    drawn.log(40)
    found = images(tmp_path / "log")
    steps = {name: [one.step for one in shown] for name, shown in found.items()}
    assert steps == {f"{TAG}/birds/a/query": [0, 20], f"{TAG}/clips/c/query": [0]}


def test_boxes_and_key_frames_are_drawn_where_the_tcot_points(dataset):
    drawn = cases(dataset)
    picture, clip = (next(drawn._drawn(place, text)).image for place, text in ((0, BOXED), (4, FRAMED)))

    def has_ink(image: Image.Image, columns: slice) -> bool:
        """In the rows of the picture, without its outermost pixels."""
        return bool((np.asarray(image.convert("L"))[20:300, columns] < 200).any())

    assert has_ink(picture, slice(310, 325)) and not has_ink(picture, slice(330, 640)), "the left half of 640"
    assert not has_ink(clip, slice(0, 640)) and has_ink(clip, slice(648, 656)), "the second frame"


def test_a_run_without_such_a_logger_is_warned_and_draws_nothing(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        drawn = cases(dataset, loggers=("console", "file"))
    assert "case_images=2 draws for wandb and tensorboard; trainer.logger has neither" in caplog.text
    for silent in (drawn, cases(dataset, count=0)):
        silent.note([row("a", 0, BOXED)])
        silent.log(0)
    assert not (tmp_path / "tensorboard_log").exists()


def test_media_that_are_gone_are_warned_of_and_the_others_are_drawn(dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    drawn = cases(dataset)
    drawn.note([row("a", 0, BOXED), row("c", 0, FRAMED)])
    dataset.media_root = str(tmp_path / "none")
    with caplog.at_level(logging.WARNING):
        drawn.log(0)
    assert "case birds/a/query is not drawn" in caplog.text and "case clips/c/query is not drawn" in caplog.text


def test_wandb_gets_them_in_its_own_run(dataset, monkeypatch):
    wandb = pytest.importorskip("wandb")
    sent = []
    monkeypatch.setattr(wandb, "log", lambda data, step: sent.append((step, data)))
    drawn = cases(dataset, loggers=("wandb",))
    drawn.note([row("a", 0, BOXED)])
    drawn.log(7)
    ((step, data),) = sent
    assert step == 7 and [image._caption for image in data[TAG]] == ["birds/a/query"]
