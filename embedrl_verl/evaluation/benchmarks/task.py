# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's task is, what a reader makes of its data, and where the data come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedrl_verl.data.schema import Item, Video
from embedrl_verl.errors import ConfigError, DataError, MediaError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")

MakeItem = Callable[[], Item]
"""Makes an item when it is needed: frames are looked up and pages read then. MediaError: its media are not there."""


@dataclass(frozen=True)
class Task:
    """One data set of a benchmark.

    Attributes:
        modality, group: of the averages.
        reader: name of the function that reads it.
        repo, config, split: on the hub; `repo` is also the folder in the data root.
        columns: that the rows must have.
        is_local: a query is ranked against the candidates of its own row; else against all of the task.
        queries, candidates: how many the published set has; candidates of a query if local, else of the task. 0: not
            known.
        file: JSON lines in `repo` that are its rows, instead of config and split.
        files: of texts: queries, candidates, relevance ("" = the queries have it), in the data root.
        media: folder of its media, in the data root.
        form: what query and target of an image task are made of: I image, T text.
        instruction, target_instruction: said to the sides; "" = none, or the rows bring them.
        metric: of the score.
        in_domain: the reference training mixture has a set of the same source.
        finds_video: its candidates are videos.
        kind: "page" if its pictures are document pages.
    """

    name: str
    modality: str
    group: str
    reader: str
    repo: str
    config: str | None = None
    split: str = "test"
    columns: tuple[str, ...] = ()
    is_local: bool = False
    queries: int = 0
    candidates: int = 0
    file: str = ""
    files: tuple[str, ...] = ()
    media: str = ""
    form: tuple[str, str] = ("T", "T")
    instruction: str = ""
    target_instruction: str = ""
    metric: str = "hit@1"
    in_domain: bool = False
    finds_video: bool = False
    kind: str | None = None

    def said(self) -> str:
        """How rows are read and asked, for stamps: what a table says beside where they lie."""
        form, instructions = "-".join(self.form), f"{self.instruction!r}, candidates {self.target_instruction!r}"
        return f"{self.reader} {form}, {self.kind or 'no pages'}, media in {self.media!r}, instruction {instructions}"


@dataclass(frozen=True)
class Rules:
    """What published runs of one benchmark differ in; every score file names them.

    Attributes:
        frames: of a clip, at int(linspace(0, n - 1, frames)).
        short_clips: clips of fewer frames: as they are, or with the last one repeated (upstream since 2026).
        white_space: texts as in the data, or with " \\n" made "\\n" (VLM2Vec).
        candidate_instruction: that of the task, or none.
        pool: candidates as the table says (local or global), or global for all tasks.
        limit: queries of a task, the first; their scores are stamped, and none is compared with a score of all.
    """

    frames: int = 8
    short_clips: Literal["as_they_are", "last_repeated"] = "as_they_are"
    white_space: Literal["raw", "collapsed"] = "raw"
    candidate_instruction: Literal["task", "none"] = "task"
    pool: Literal["table", "global"] = "table"
    limit: int | None = None

    def text(self, text: str) -> str:
        """A text of the data, without the image placeholder of the first version's files."""
        text = text.replace("<|image_1|>", "")
        return text.replace(" \n", "\n") if self.white_space == "collapsed" else text

    def for_target(self, instruction: str) -> str:
        """The instruction that a candidate gets."""
        return instruction if self.candidate_instruction == "task" else ""

    def clip(self, root: Path, folder: str) -> Video:
        """The frames that are drawn from a folder, as paths in `root`."""
        try:
            found = [one.name for one in (root / folder).iterdir() if one.suffix.lower() in FRAME_SUFFIXES]
        except OSError as error:
            raise MediaError(f"frames {folder!r} cannot be read in {root}: {error}") from error
        if not found:
            raise MediaError(f"frames {folder!r}: the folder has no {', '.join(FRAME_SUFFIXES)}")
        found.sort(key=natural)
        chosen = [found[index] for index in frame_indices(len(found), self.frames)]
        if self.short_clips == "last_repeated":
            chosen += chosen[-1:] * (self.frames - len(chosen))
        return Video(tuple(f"{folder}/{name}" for name in chosen))


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (0, part.lower()) for part in re.split(r"(\d+)", name)]


def frame_indices(total: int, count: int) -> list[int]:
    """`count` of 0..total-1 as int(linspace(0, total - 1, count)), the reference's rule; all if there are fewer."""
    if total <= count:
        return list(range(total))
    return [index * (total - 1) // (count - 1) for index in range(count)] if count > 1 else [0]


@dataclass(frozen=True)
class Query:
    """A query: its id in the task, its item, the grades of its relevant candidates (above 0), and the names of its own
    candidates (None: all of the task)."""

    id: str
    item: MakeItem
    grades: Mapping[str, float]
    candidates: Sequence[str] | None = None


@dataclass
class TaskData:
    """What a reader makes of a task: the queries, and the candidates by name; the first of a name is the candidate."""

    queries: list[Query] = field(default_factory=list)
    items: dict[str, MakeItem] = field(default_factory=dict)

    def ask(
        self,
        item: MakeItem,
        options: Iterable[tuple[str, MakeItem]],
        relevant: Mapping[str, float] | Iterable[str],
        *,
        is_local: bool,
        query_id: str | None = None,
    ) -> None:
        """Add a query with its own candidates; `relevant`: grades, or names of grade 1."""
        names = []
        for name, make in options:
            self.items.setdefault(name, make)
            names.append(name)
        grades = dict(relevant) if isinstance(relevant, Mapping) else dict.fromkeys(relevant, 1.0)
        own = list(dict.fromkeys(names)) if is_local else None
        number = query_id if query_id is not None else str(len(self.queries))
        self.queries.append(Query(number, item, grades, own))


class Source:
    """The data of a benchmark: folders of `root`, named as the repositories on the hub are; what is not there is asked
    of the hub itself, which `datasets` downloads.

    Args:
        root: of the data and of all media.
        revision: of repositories on the hub.
    """

    def __init__(self, root: str | Path, revision: str | None = None) -> None:
        self.root, self.revision = Path(root), revision
        if not self.root.is_dir():
            raise ConfigError(f"the data root must be a folder that holds the hub's repositories; {root} is none")
        self._digest = hashlib.sha256()

    def __reduce__(self) -> tuple[type[Source], tuple[Path, str | None]]:
        return Source, (self.root, self.revision)  # of which nothing has been read

    @property
    def digest(self) -> str:
        """Of all rows read so far, without their pixels: says which revision of the data was scored."""
        return self._digest.hexdigest()[:16]

    def rows(
        self,
        repo: str,
        config: str | None = None,
        split: str = "test",
        *,
        columns: Sequence[str] = (),
        file: str | None = None,
    ) -> Any:
        """The rows as a `datasets.Dataset`, images not decoded.

        Args:
            columns: that must be there.
            file: JSON lines or parquet in the repository, instead of config and split.
        """
        import datasets

        folder, what = self.root / repo, f"{repo} ({config or 'default'}, {split})"
        try:
            if file is not None:
                pinned = f"{repo}@{self.revision}" if self.revision else repo
                place = str(folder / file) if folder.is_dir() else f"hf://datasets/{pinned}/{file}"
                kind = "parquet" if file.endswith(".parquet") else "json"
                found = datasets.load_dataset(kind, data_files=place, split="train")
            elif not folder.is_dir():
                found = datasets.load_dataset(repo, config, split=split, revision=self.revision)
            elif _declares_configs(folder):
                found = datasets.load_dataset(str(folder), config, split=split)
            else:  # of files alone, `datasets` names this split itself
                named = "validation" if split == "val" else split
                found = datasets.load_dataset(str(folder), data_dir=config, split=named)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{what} cannot be read in {self.root} nor on the hub: {error}") from error
        if missing := sorted(set(columns) - set(found.column_names)):
            raise DataError(f"{what} must have the columns {', '.join(columns)}; {', '.join(missing)} are missing")
        images = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
        for name in images:
            found = found.cast_column(name, datasets.Image(decode=False))
        for row in found.remove_columns(images):
            self._digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return found

    def lines(self, file: str) -> list[str]:
        """The lines of a text file in the root; [] without it."""
        path = self.root / file
        found = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._digest.update("\n".join(found).encode())
        return found


def _declares_configs(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and "config_name:" in card.read_text(encoding="utf-8")
