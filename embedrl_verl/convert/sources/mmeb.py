# SPDX-License-Identifier: Apache-2.0
"""MMEB-train: 20 image sets in one schema (hub repository TIGER-Lab/MMEB-train).

Files: `<set>/original-00000-of-00001.parquet` and the same of the split `diverse_instruction`, whose instructions are
paraphrased. Columns: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path (one hard negative, or
""). The images are packed apart (`images_zip/<set>.zip`); unpacked, the paths of the rows (`images/<set>/Train/...`)
lie under the media root. Embed-RL's copies, `<set>.jsonl`, are read too if there are no such files.

| column | becomes |
|---|---|
| qry | instruction (known words at its start) and query text; placeholder `<|image_1|>` taken out |
| qry_image_path | query image |
| pos_text | target text; for image targets the target's instruction (WebQA: instruction and caption) |
| pos_image_path | target image |
| neg_text, neg_image_path | one hard negative, if asked for and not the positive answer itself |
| query_cot, pos_cot | T-CoTs (Embed-RL's copies have them) |

Queries of WebQA carry the placeholder though they have no image: it is dropped. Anywhere else a placeholder without an
image means that the image is missing, and the row is rejected.

Same content: answers and labels by their words (`answer_id`). Captions and images have no id here; the same text or the
same bytes are the same content, as for every record without an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from embedrl_verl.convert.answers import answer_id
from embedrl_verl.convert.converter import InputRoot, RawRow, RowError, Setting, Shard, show
from embedrl_verl.convert.instructions import MMEB_TASKS, MmebTask, split_instruction
from embedrl_verl.convert.media_store import map_media
from embedrl_verl.convert.sources import MMEB_SOURCES
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.errors import ConfigError, DataError

SPLITS = ("original", "diverse_instruction", "train")
LEGACY_PLACEHOLDER = "WebQA"
_PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class MmebTrain:
    """Converter of MMEB-train.

    Args:
        sets: which of the 20; () = all that the root has.
        split: "original", as the reference trains; "diverse_instruction"; or "train", the name in the first upload.
        negatives: keep the hard negatives. Off by default: the reference training has none, and for training with
            T-CoTs each of them would have to be annotated too.
        images_dir: put before the paths of the rows: the folder of `images/`, relative to the media root. Sources that
            are trained together share one media root.
    """

    sets: tuple[str, ...] = ()
    split: str = "original"
    negatives: bool = False
    images_dir: str = ""

    name = "mmeb_train"
    licence = "apache-2.0 (tag of the hub repository; the image sets in it keep their own terms)"

    def __post_init__(self) -> None:
        for name in self.sets:
            if name not in MMEB_TASKS:
                raise ConfigError(f"unknown set {name!r}{_meant(name)}; known are {', '.join(MMEB_TASKS)}")
        if self.split not in SPLITS:
            raise ConfigError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All but the sets, which show in the shards."""
        return {"split": self.split, "negatives": self.negatives, "images_dir": self.images_dir}

    def shards(self, root: InputRoot) -> list[Shard]:
        """The files of the wanted sets, in the order of the table."""
        found: dict[str, list[str]] = {}
        for name in self.sets or MMEB_TASKS:
            files = root.files(f"{name}/{self.split}-*.parquet") or root.files(f"{name}.jsonl", f"{name}.jsonl.gz")
            if not files and len(self.sets) == 1:  # the root is the folder of the set
                files = root.files(f"{self.split}-*.parquet")
            if files and not self.sets and not files[0].startswith((f"{name}/", f"{name}.")):
                raise DataError(f"{files[0]}: the path does not tell which set this is; name it with --sets")
            if not files and self.sets:
                raise DataError(f"no {name}/{self.split}-*.parquet; MMEB-train has one folder for each set")
            if files:
                found[name] = files
        if not found:
            raise DataError(
                f"no <set>/{self.split}-*.parquet; if the input is the folder of one set, name it with --sets. "
                f"The sets of MMEB-train are {', '.join(MMEB_TASKS)}"
            )
        return [Shard(file, MMEB_SOURCES[name], note=name) for name, files in found.items() for file in files]

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pair of a row. Raises RowError."""
        name = row.shard.note
        task = MMEB_TASKS[name]
        instruction, query = _query(row, name, task)
        target = _target(row, "pos", task)
        record = PairRecord(
            pair_id=row.pair_id(),
            data_source=row.shard.source,
            instruction=instruction,
            query=query,
            target=target,
            target_id=answer_id(target.text) if task.answers else "",
            negatives=tuple(_negatives(row, task, target)) if self.negatives else (),
        )
        return [map_media(record, lambda _, path: self._under_root(str(path))) if self.images_dir else record]

    def _under_root(self, path: str) -> str:
        return PurePosixPath(self.images_dir, path).as_posix()


def _query(row: RawRow, name: str, task: MmebTask) -> tuple[str, Item]:
    images = _paths(row, "qry_image_path")
    text = _without_placeholder(row.text("qry"), "qry", has_image=bool(images) or name == LEGACY_PLACEHOLDER)
    if not text:
        raise RowError("qry", f"must have at least the instruction; got {show(row.value('qry'))}")
    if task.query_image and not images:
        raise RowError(
            "qry_image_path", f"the queries of {name} have an image; got {show(row.value('qry_image_path'))}"
        )
    instruction, own = split_instruction(text, task.query)
    if not task.query_text and not instruction:
        instruction, own = text, ""
    if task.query_text and not own:
        raise RowError("qry", f"the queries of {name} have text of their own; got {show(row.value('qry'))}")
    item = Item(text=own, images=images, kind="page" if task.pages else None, tcot=row.text("query_cot", "").strip())
    return instruction, item


def _target(row: RawRow, prefix: str, task: MmebTask) -> Item:
    """The target, or with the prefix "neg" the hard negative."""
    images = _paths(row, f"{prefix}_image_path")
    field = f"{prefix}_text"
    text = _without_placeholder(_only_text(row, field), field, has_image=bool(images))
    tcot = row.text("pos_cot", "").strip() if prefix == "pos" else ""
    if not task.target_image:
        if not text:
            raise RowError(field, f"must have a text; got {show(row.value(field))}")
        return Item(text=text, images=images, tcot=tcot)
    if not images:
        raise RowError(f"{prefix}_image_path", f"an image target needs an image; got {show(row.value(field))}")
    instruction, own = split_instruction(text, task.target)
    if not task.target_text and not instruction:
        instruction, own = text, ""
    return Item(text=own, images=images, instruction=instruction, tcot=tcot)


def _negatives(row: RawRow, task: MmebTask, target: Item) -> Iterator[Item]:
    """The hard negative of a row, if it has one and it is none of the positive's content."""
    if not (row.text("neg_text", "").strip() or _paths(row, "neg_image_path", required=False)):
        return
    negative = _target(row, "neg", task)
    if task.target_image and not negative.instruction:  # negatives of VisDial have no text at all
        negative = Item(negative.text, negative.images, instruction=target.instruction)
    if task.answers and answer_id(negative.text) == answer_id(target.text):
        return
    if (negative.text, negative.images) != (target.text, target.images):
        yield negative


def _paths(row: RawRow, field: str, *, required: bool = True) -> tuple[str, ...]:
    """Image paths: a string or a list of strings; "" is none."""
    if not required and field not in row.values:
        return ()
    return tuple(path for path in row.texts(field) if path.strip())


def _only_text(row: RawRow, field: str) -> str:
    texts = row.texts(field)
    if len(texts) > 1:
        raise RowError(field, f"must be one text; got {len(texts)}, and which of them is the target is not known")
    return texts[0] if texts else ""


def _without_placeholder(text: str, field: str, *, has_image: bool) -> str:
    """The text without `<|image_1|>`, stripped.

    Raises:
        RowError: a placeholder and no image, several, or one of a second image.
    """
    numbers = _PLACEHOLDER.findall(text)
    if numbers and not has_image:
        raise RowError(field, f"the text has a placeholder for an image, but the row has none; got {show(text)}")
    if numbers not in ([], ["1"]):
        raise RowError(field, f"at most one placeholder, <|image_1|>, is known; got {show(text)}")
    return _PLACEHOLDER.sub("", text).strip()


def _meant(name: str) -> str:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    near = [known for known in MMEB_TASKS if plain(known) == plain(name)]
    return f" (here it is {near[0]})" if near else ""
