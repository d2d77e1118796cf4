# SPDX-License-Identifier: Apache-2.0
"""MMEB-train (TIGER-Lab/MMEB-train) as pair records: 20 image sets in one schema.

python data_preprocess/mmeb_train.py --input MMEB-train --media-root MMEB-train --preset paper_caps --out data/mmeb

Files: `<set>/original-00000-of-00001.parquet` and the same of the split `diverse_instruction`, whose instructions are
paraphrased. The images are packed apart (`images_zip/<set>.zip`); unpacked, the paths of the rows
(`images/<set>/Train/...`) lie under the media root. Embed-RL's copies, `<set>.jsonl`, are read too if there are no such
files.

| column | becomes |
|---|---|
| qry | instruction (known words at its start) and query text; placeholder `<|image_1|>` taken out |
| qry_image_path | query image |
| pos_text | target text; for image targets the target's instruction (WebQA: instruction and caption) |
| pos_image_path | target image |
| neg_text, neg_image_path | with `--negatives` one hard negative, if it is not the positive itself |
| query_cot, pos_cot | T-CoTs (Embed-RL's copies have them) |

docs/data.md says what becomes of an unknown instruction, and of a placeholder without an image.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.common import QUESTION, answer_id, split_instruction
from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard, option, show
from embedrl_verl.convert.inputs import InputRoot
from embedrl_verl.convert.media_store import map_media
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import DataError


@dataclass(frozen=True)
class Task:
    """What the rows of one set hold: the instructions of both sides, whether these have an image, and text of their
    own; whether targets are short answers or labels, the same for many queries, and images document pages."""

    query: str
    query_image: bool = True
    query_text: bool = False
    target: str = ""
    target_image: bool = False
    target_text: bool = True
    answers: bool = False
    pages: bool = False


def questions(*, pages: bool = False) -> Task:
    return Task(QUESTION, query_text=True, answers=True, pages=pages)


def images(query: str, *, image: bool, text: bool = True, target: str = "Represent the given image.") -> Task:
    return Task(query, query_image=image, query_text=text, target=target, target_image=True, target_text=False)


# Names are those of the training repository's folders. MSCOCO is visual grounding.
TASKS = {
    "ImageNet_1K": Task("Represent the given image for classification", answers=True),
    "N24News": Task(
        "Represent the given news image with the following caption for domain classification:",
        query_text=True,
        answers=True,
    ),
    "HatefulMemes": Task(
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not",
        answers=True,
    ),
    "VOC2007": Task("Identify the object shown in the image", answers=True),
    "SUN397": Task("Identify the scene shown in the image", answers=True),
    "OK-VQA": questions(),
    "A-OKVQA": questions(),
    "DocVQA": questions(pages=True),
    "InfographicsVQA": questions(pages=True),
    "ChartQA": questions(),
    "Visual7W": questions(),
    "VisDial": images(
        "Represent the given dialogue about an image, which is used for image retrieval:",
        image=False,
        target="Represent the given image",
    ),
    "CIRR": images("Given an image, find a similar everyday image with the described changes:", image=True),
    "VisualNews_t2i": images("Retrieve an image of this news caption.", image=False),
    "VisualNews_i2t": Task("Find a caption for the news in the given photo."),
    "MSCOCO_t2i": images("Find me an everyday image that matches the given caption:", image=False),
    "MSCOCO_i2t": Task("Find an image caption describing the given everyday image."),
    "NIGHTS": images("Find a day-to-day image that looks similar to the provided image.", image=True, text=False),
    "WebQA": Task(
        "Find a Wikipedia image that answers this question:",
        query_image=False,
        query_text=True,
        target="Represent the given Wikipedia image with related text information:",
        target_image=True,
    ),
    "MSCOCO": images(
        "Select the portion of the image that isolates the object labeled as",
        image=True,
        target="Represent the given cropped image of the object",
    ),
}


SOURCES = {name: f"mmeb_{name.lower().replace('-', '')}" for name in TASKS}
"""Set -> data source, as `mmeb_okvqa`."""
SPLITS = ("original", "diverse_instruction", "train")
LEGACY_PLACEHOLDER = "WebQA"
PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class MmebTrain(Converter):
    sets: tuple[str, ...] = option((), "all by default", tuple(TASKS))
    split: str = option("original", "wording of the instructions; train is its name in the first upload", SPLITS)
    images_dir: str = option("", "folder of images/, relative to the media root (the root)")
    # Off: the reference training has none, and for training with T-CoTs each would have to be annotated too.
    negatives: bool = option(False, "keep the hard negatives that some sets have")

    name = "mmeb_train"
    licence = "apache-2.0 (tag of the hub repository; the image sets in it keep their own terms)"

    def shards(self, root: InputRoot) -> list[Shard]:
        shards = []
        for name in self.sets or TASKS:
            files = root.files(f"{name}/{self.split}-*.parquet") or root.files(f"{name}.jsonl", f"{name}.jsonl.gz")
            if not files and len(self.sets) == 1:  # the root is the folder of the set
                files = root.files(f"{self.split}-*.parquet")
            if not files and self.sets:
                raise DataError(f"no {name}/{self.split}-*.parquet; MMEB-train has one folder for each set")
            if files and not self.sets and not files[0].startswith((f"{name}/", f"{name}.")):
                raise DataError(f"{files[0]}: the path does not tell which set this is; name it with --sets")
            shards += [Shard(file, SOURCES[name], note=name) for file in files]
        if not shards:
            raise DataError(
                f"no <set>/{self.split}-*.parquet; if the input is the folder of one set, name it with --sets. "
                f"The sets of MMEB-train are {', '.join(TASKS)}"
            )
        return shards

    def convert(self, row: RawRow) -> PairRecord:
        task = TASKS[row.shard.note]
        instruction, query = query_of(row, task)
        target = target_of(row, "pos", task)
        target_id = answer_id(target.text) if task.answers else ""
        negatives = tuple(negatives_of(row, task, target)) if self.negatives else ()
        record = PairRecord(row.pair_id(), row.shard.source, instruction, query, target, target_id, negatives)
        if not self.images_dir:
            return record
        return map_media(record, lambda _, path: PurePosixPath(self.images_dir, str(path)).as_posix())


def query_of(row: RawRow, task: Task) -> tuple[str, Item]:
    name, images = row.shard.note, paths(row, "qry_image_path")
    text = without_placeholder(row.text("qry"), "qry", has_image=bool(images) or name == LEGACY_PLACEHOLDER)
    if not text:
        raise RowError("qry", f"must have at least the instruction; got {show(row.value('qry'))}")
    if task.query_image and not images:
        got = show(row.value("qry_image_path"))
        raise RowError("qry_image_path", f"the queries of {name} have an image; got {got}")
    instruction, own = instruction_and_text(text, task.query, task.query_text)
    if task.query_text and not own:
        raise RowError("qry", f"the queries of {name} have text of their own; got {show(row.value('qry'))}")
    kind = "page" if task.pages else None
    return instruction, Item(text=own, images=images, kind=kind, tcot=row.text("query_cot", "").strip())


def target_of(row: RawRow, prefix: str, task: Task) -> Item:
    """The target, or with the prefix "neg" the hard negative."""
    images, field = paths(row, f"{prefix}_image_path"), f"{prefix}_text"
    texts = row.texts(field)
    if len(texts) > 1:
        raise RowError(field, f"must be one text; got {len(texts)}, and which of them is the target is not known")
    text = without_placeholder("".join(texts), field, has_image=bool(images))
    tcot = row.text("pos_cot", "").strip() if prefix == "pos" else ""
    if not task.target_image:
        if not text:
            raise RowError(field, f"must have a text; got {show(row.value(field))}")
        return Item(text=text, images=images, tcot=tcot)
    if not images:
        raise RowError(f"{prefix}_image_path", f"an image target needs an image; got {show(row.value(field))}")
    instruction, own = instruction_and_text(text, task.target, task.target_text)
    return Item(text=own, images=images, instruction=instruction, tcot=tcot)


def instruction_and_text(text: str, known: str, has_text: bool) -> tuple[str, str]:
    """An unknown wording is the instruction where a side has no text of its own, else the text."""
    instruction, own = split_instruction(text, known)
    return (instruction, own) if instruction or has_text else (text, "")


def negatives_of(row: RawRow, task: Task, target: Item) -> Iterator[Item]:
    """The hard negative of a row, if it has one and it is none of the positive's content."""
    has_image = "neg_image_path" in row.values and paths(row, "neg_image_path")
    if not (row.text("neg_text", "").strip() or has_image):
        return
    negative = target_of(row, "neg", task)
    if task.target_image and not negative.instruction:  # negatives of VisDial have no text at all
        negative = replace(negative, instruction=target.instruction)
    if task.answers and answer_id(negative.text) == answer_id(target.text):
        return
    if (negative.text, negative.images) != (target.text, target.images):
        yield negative


def paths(row: RawRow, field: str) -> tuple[str, ...]:
    """Image paths: a string or a list of strings; "" is none."""
    return tuple(path for path in row.texts(field) if path.strip())


def without_placeholder(text: str, field: str, *, has_image: bool) -> str:
    """The text without `<|image_1|>`, stripped."""
    numbers = PLACEHOLDER.findall(text)
    if numbers and not has_image:
        raise RowError(field, f"the text has a placeholder for an image, but the row has none; got {show(text)}")
    if numbers not in ([], ["1"]):
        raise RowError(field, f"at most one placeholder, <|image_1|>, is known; got {show(text)}")
    return PLACEHOLDER.sub("", text).strip()


if __name__ == "__main__":
    sys.exit(convert_main(MmebTrain, __doc__))
