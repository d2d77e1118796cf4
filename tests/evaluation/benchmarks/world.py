# SPDX-License-Identifier: Apache-2.0
"""Benchmark data in the published schema, with three queries a task, and models whose scores are known beforehand.

An item shows two digits, as text ("#1@2") or as the colour of its picture: what a plain look at it says, and what a
T-CoT finds. The third query of each task looks like the first one, so plain Hit@1 is 2/3; with the Reasoner's T-CoTs
queries are all right, and candidates are all alike.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb
from embedrl_verl.evaluation.benchmarks.task import Task
from embedrl_verl.model.embedders import Embedded
from embedrl_verl.model.tcots import Written

LOOKS, TRUTH = (0, 1, 0), (0, 1, 2)
ALIKE, OTHER = 9, 8
POOL = 12
"""Candidates of a set of UVRB, so that the last one is not within the first ten."""


def digits(item: Any) -> tuple[int, int]:
    """(how it looks, what it is)"""
    if found := re.search(r"#(\d)@(\d)", item.text):
        return int(found[1]), int(found[2])
    if item.text in ("yes", "no"):
        return int(item.text == "no"), ALIKE
    red, green, _ = (*item.frames, *item.images)[0].getpixel((0, 0))
    return red // 20, green // 20


class FakeEmbedder:
    """A unit vector for each digit that an item looks like, or that its T-CoT names; `collapsed`: one for all."""

    def __init__(self, collapsed: bool = False) -> None:
        self.collapsed, self.seen = collapsed, 0

    def vectors(self, inputs: Any, side: str) -> list[Embedded]:
        self.seen += len(inputs)
        named = [int(one.tcot.text[-1]) if one.tcot else digits(one.item)[0] for one in inputs]
        return [Embedded(one) for one in torch.eye(10)[[0 if self.collapsed else digit for digit in named]]]


class FakeReasoner:
    """Says what a query is, and nothing of a candidate."""

    family = "qwen3_vl"

    def write(self, asks: Any) -> list[Written]:
        said = [digits(item)[1] if kind.startswith("query") else ALIKE for kind, item in asks]
        return [Written(f"it is {digit}") for digit in said]


def picture(path: Path, looks: int, truth: int = ALIKE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (20 * looks + 5, 20 * truth + 5, 0)).save(path, "PNG")


def clip(folder: Path, looks: int, truth: int = ALIKE) -> None:
    """The second frame comes first where names are sorted letter by letter."""
    picture(folder / "frame_2.jpg", looks, truth)
    picture(folder / "frame_10.jpg", OTHER)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(root: Path, task: Task) -> None:
    """Write the data of a task."""
    if task.reader == "uvrb":
        return _uvrb(root, task)
    if task.reader == "pages":
        return _pages(root, task)
    rows = [_ROWS[task.reader](root / task.media, task, number) for number in range(3)]
    folder = root / task.repo
    if task.reader == "moment_seeker":
        return lines(folder / "momentseeker_1k6.jsonl", rows)
    for config in (task.config or ".").split(","):
        lines(folder / config / f"{task.split}.jsonl", rows)
    return None


def _image(media: Path, task: Task, number: int) -> dict[str, Any]:
    query, target = task.form
    order = [number, *(other for other in range(3) if other != number)]
    if "I" in query:
        picture(media / task.name / f"q{number}.png", LOOKS[number], TRUTH[number])
    for one in range(3) if "I" in target else ():
        picture(media / task.name / f"c{one}.png", one)
    return {
        "qry_inst": "<|image_1|>\nFind it.",
        "qry_text": f"what is #{LOOKS[number]}@{TRUTH[number]}" if "T" in query else "",
        "qry_img_path": f"{task.name}/q{number}.png" if "I" in query else "",
        "tgt_inst": "<|image_1|>\nRepresent it." if "I" in target else "",
        "tgt_text": [f"this #{one}@{ALIKE}" if "T" in target else "" for one in order],
        "tgt_img_path": [f"{task.name}/c{one}.png" if "I" in target else "" for one in order],
    }


def _labels(media: Path, task: Task, number: int) -> dict[str, Any]:
    clip(media / f"v{number}", LOOKS[number], TRUTH[number])
    names = [f"label #{one}@{ALIKE}" for one in range(3)]
    row = {"video_id": f"v{number}", "pos_text": names[number]}
    return {**row, "neg_text": names} if task.is_local else row


def _questions(media: Path, task: Task, number: int) -> dict[str, Any]:
    right = min(number, 1) if task.name == "ActivityNetQA" else number
    question = f"why #{LOOKS[number]}@{right}"
    options = [f"so #{one}@{ALIKE}" for one in range(5)]
    lettered = [f"{letter}. {one}" for letter, one in zip("ABCDE", options, strict=True)]
    name = f"v{number}"
    folders = {"MVBench": [f"{one}/{name}" for one in (task.config or "").split(",")], "ActivityNetQA": [f"v_{name}"]}
    for folder in folders.get(task.name, [name]):
        clip(media / folder, LOOKS[number], right)
    rows = {
        "MVBench": {"video": name, "candidates": options[:3], "answer": options[right]},
        "Video-MME": {"videoID": name, "options": lettered[:4], "answer": "ABCD"[right]},
        "NExTQA": {"video": name, **{f"a{at}": one for at, one in enumerate(options)}, "answer": right},
        "EgoSchema": {"video_idx": name, "option": lettered, "answer": str(right)},
        "ActivityNetQA": {"video_name": name, "answer": "no" if right else "yes"},
    }
    return {"question": question, **rows[task.name]}


def _captions(media: Path, task: Task, number: int) -> dict[str, Any]:
    column, caption = task.columns
    clip(media / f"v{number}", number)
    text = f"a #{LOOKS[number]}@{TRUTH[number]}"
    name = f"somewhere/v{number}.mp4" if column == "video" else f"v{number}"
    return {column: name, caption: [text, "another"] if task.name in ("MSVD", "VATEX") else text}


def _moments(media: Path, task: Task, number: int) -> dict[str, Any]:
    clip(media / f"v{number}" / "query", LOOKS[number], TRUTH[number])
    for one in range(3):
        clip(media / f"v{number}" / (f"positive_{one}" if one == number else f"a_negative_{one}"), one)
    return {"query": f"a #{LOOKS[number]}@{TRUTH[number]}", "video_path": f"videos/v{number}.mp4"}


def _moment_seeker(media: Path, task: Task, number: int) -> dict[str, Any]:
    given = (f"in/v{number}.mp4", f"p{number}.jpg", "")[number]
    clip(media / "video_frames" / f"in_v{number}", LOOKS[number], TRUTH[number])
    picture(media / f"query_p{number}.jpg", LOOKS[number], TRUTH[number])
    for one in range(3):
        clip(media / "video_frames" / f"clips_c{one}", one)
    paths = [{"output_path": f"clips/c{one}.mp4"} for one in range(3)]
    row = {"query": f"a #{LOOKS[number]}@{TRUTH[number]}", "input_frames": given, "positive_frames": [paths[number]]}
    return {**row, "negative_frames": [path for one, path in enumerate(paths) if one != number]}


_ROWS = {
    "image": _image,
    "labels": _labels,
    "questions": _questions,
    "captions": _captions,
    "moments": _moments,
    "moment_seeker": _moment_seeker,
}


def _pages(root: Path, task: Task) -> None:
    images = [root / "scans" / task.name / f"{number}.png" for number in range(3)]
    for number, path in enumerate(images):
        picture(path, number)
    texts = [f"page #{looks}@{truth}" for looks, truth in zip(LOOKS, TRUTH, strict=True)]
    corpus = datasets.Dataset.from_dict(
        {"corpus-id": list(range(3)), "image": [{"bytes": path.read_bytes(), "path": None} for path in images]},
        features=datasets.Features({"corpus-id": datasets.Value("int64"), "image": datasets.Image()}),
    )
    tables = {
        "corpus": corpus,
        "queries": datasets.Dataset.from_dict({"query-id": [f"q{one}" for one in range(3)], "query": texts}),
        "qrels": datasets.Dataset.from_dict(
            {
                "query-id": ["q0", "q1", "q2", "q2", "q2"],
                "corpus-id": [0, 1, 2, 2, 0],
                "score": [1, 1, 2, 1, 0],
            }
        ),
    }
    for name, table in tables.items():
        (root / task.repo / name).mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / task.repo / name / f"{task.split}-00000-of-00001.parquet")


def _uvrb(root: Path, task: Task) -> None:
    folder = root / task.repo / task.name.replace("-", "_")
    shows_image, shows_video = task.name in ("MS-TI", "MSRVTT-I2V"), task.name in ("MS-TV", "LoVR-C2V")
    queries, count = [], 3 if task.is_local else POOL
    for number in range(3):
        picture(folder / f"q{number}.png", LOOKS[number], TRUTH[number])
        clip(folder / f"q{number}", LOOKS[number], TRUTH[number])
        row: dict[str, Any] = {"id": f"q{number}"}
        row |= {"image": f"q{number}.png"} if shows_image else {"video": f"q{number}"} if shows_video else {}
        if task.name not in ("MSRVTT-I2V", "LoVR-C2V"):
            row["text"] = f"a #{LOOKS[number]}@{TRUTH[number]}"
        queries.append(row)
    for number in range(count):
        clip(folder / f"c{number}", number if number < 3 else OTHER)
    instances = [{"qid": f"q{one}", "pos": [f"c{one}"]} for one in range(3)]
    if task.is_local:
        for one, instance in enumerate(instances):
            instance["neg"] = [f"c{other}" for other in range(3) if other != one]
    lines(folder / "jsonl" / "queries.jsonl", queries)
    lines(folder / "jsonl" / "corpus.jsonl", [{"id": f"c{one}", "video": f"c{one}"} for one in range(count)])
    lines(folder / "jsonl" / "instances.jsonl", instances)


TASKS = [(module.NAME, task) for module in (mmeb_v2, uvrb) for task in module.TASKS.values()]
