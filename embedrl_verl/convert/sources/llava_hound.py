# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Hound: captions of videos and questions about them, in three modes.

Hub repository ShareGPTVideo/train_video_and_instruction. Annotations are lines {id, video, conversations: [{from:
"human", value}, {from: "gpt", value}]}: `video_caption_300k.jsonl`, and `video_240k_caption_15k.jsonl`, whose first
240,000 lines are questions and whose rest are captions (or `video_qa_240k.jsonl`, those lines cut out). A video is a
folder of frames `<frames dir>/<video>/*.jpeg` under the media root, or a file `<frames dir>/<video>.mp4`.

| mode | query | target |
|---|---|---|
| caption_retrieval | what the human asks (instruction) + video | what gpt answers: the caption |
| qa | question + video | the answer |
| video_retrieval | the **caption** | the **video**: the two change roles |

Of a folder of frames the reference's 8 are named, indices int(linspace(0, n - 1, 8)) in natural order; of fewer than 8
all. Their frames per second are not known.

Embed-RL's copies {dataset_name, qry: {conversations, video}, pos: {conversations, video}, query_cot, pos_cot} are read
too: there a video is a list of frame paths, and the path of a blank picture, `images/blank.jpg`, means "no video on
this side". Its lists in one .json file have to be written as one object a line first. A file whose name begins with
that of a mode (`llavahound_qa_1.jsonl`) is read for this mode alone, another one for all.

Same content: videos, and captions of one video (each answers the others' query), by the video's name; answers by their
words.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embedrl_verl.convert.answers import answer_id
from embedrl_verl.convert.converter import InputRoot, RawRow, RowError, Setting, Shard, as_text, show
from embedrl_verl.convert.inputs import natural_key
from embedrl_verl.convert.instructions import FIND_VIDEO, UNDERSTAND_VIDEO, VIDEO_QUESTION, split_instruction
from embedrl_verl.convert.sources import (
    LLAVAHOUND_QA,
    LLAVAHOUND_SOURCES,
)
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ConfigError, DataError

MODES = {source.removeprefix("llavahound_"): source for source in LLAVAHOUND_SOURCES}
CAPTIONS, QUESTIONS, QUESTIONS_ALONE = (
    "video_caption_300k.jsonl",
    "video_240k_caption_15k.jsonl",
    "video_qa_240k.jsonl",
)
QUESTION_LINES = 240_000
FRAMES = 8
BLANK = "blank.jpg"
VIDEO_MARK = "<video>"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
EMBED_RL = "embed_rl"


@dataclass(frozen=True)
class LlavaHound:
    """Converter of LLaVA-Hound.

    Args:
        media_root: folder under which the videos lie; frames are looked up there row by row.
        modes: some of caption_retrieval, qa, video_retrieval; each is a data source of its own.
        frames_dir: folder of the videos, relative to the media root.
        frames: frames to name of a folder; 0 = all.
        question_lines: lines of `video_240k_caption_15k.jsonl` that are questions.
        embed_rl: read Embed-RL's copies, *.jsonl whose rows name their mode.
    """

    media_root: str
    modes: tuple[str, ...] = tuple(MODES)
    frames_dir: str = "train_300k"
    frames: int = FRAMES
    question_lines: int = QUESTION_LINES
    embed_rl: bool = False

    name = "llavahound"
    licence = "apache-2.0 (tag of the hub repository; the videos keep their own terms)"

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in MODES]
        if unknown or not self.modes:
            raise ConfigError(f"modes must be some of {', '.join(MODES)}; got {', '.join(self.modes) or 'none'}")
        if self.frames < 0 or self.question_lines < 1:
            raise ConfigError(
                f"frames must not be negative and question_lines positive; got {self.frames} and {self.question_lines}"
            )

    @property
    def settings(self) -> Mapping[str, Setting]:
        """All but the modes (they show in the shards) and the media root (the job notes it)."""
        return {
            "frames_dir": self.frames_dir,
            "frames": self.frames,
            "question_lines": self.question_lines,
            "embed_rl": self.embed_rl,
        }

    def shards(self, root: InputRoot) -> list[Shard]:
        """One file for each mode. Raises DataError if the file of a mode is missing."""
        if self.embed_rl:
            files = root.files("**/*.jsonl", "**/*.jsonl.gz")
            if not files:
                raise DataError("no .jsonl; write Embed-RL's lists as one JSON object a line")
            return [
                Shard(file, MODES[mode], note=f"{EMBED_RL}:{mode}")
                for mode in self.modes
                for file in files
                if _named_mode(file) in (mode, None)
            ]
        return [self._shard(root, mode) for mode in self.modes]

    def _shard(self, root: InputRoot, mode: str) -> Shard:
        if mode != "qa":
            return Shard(_first(root, CAPTIONS), MODES[mode], note=mode)
        alone = root.files(f"**/{QUESTIONS_ALONE}", f"**/{QUESTIONS_ALONE}.gz")
        if alone:
            return Shard(alone[0], LLAVAHOUND_QA, note=mode)
        return Shard(_first(root, QUESTIONS), LLAVAHOUND_QA, stop=self.question_lines, note=mode)

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The pair of a row in its shard's mode. Raises RowError."""
        if row.shard.note.startswith(EMBED_RL):
            return self._embed_rl(row, row.shard.note.partition(":")[2])
        human, gpt = _turns(row.value("conversations"), "conversations")
        name = as_text(_only(row.value("video"), "video"), "video").strip()
        return [_pair(row, row.shard.note, human, gpt, self._video(name), name)]

    def _embed_rl(self, row: RawRow, mode: str) -> Iterable[PairRecord]:
        dataset = row.text("dataset_name")
        if dataset not in LLAVAHOUND_SOURCES:
            raise RowError("dataset_name", f"must be one of {', '.join(LLAVAHOUND_SOURCES)}; got {show(dataset)}")
        if dataset != MODES[mode]:
            return []
        query, target = (_side(row.value(side), side) for side in ("qry", "pos"))
        swapped = mode == "video_retrieval"
        words = _turns(query["conversations"], "qry.conversations", need="gpt" if swapped else "human")
        other = _turns(target["conversations"], "pos.conversations", need="human" if swapped else "gpt")
        side, field = (target, "pos.video") if swapped else (query, "qry.video")
        frames = _frame_paths(side["video"], field)
        if not frames:
            raise RowError(field, f"the mode {mode} has a video on this side; got {show(side['video'])}")
        if _frame_paths((query if swapped else target)["video"], "qry.video" if swapped else "pos.video"):
            raise RowError("video", f"the mode {mode} has a video on one side only; got two")
        human, gpt = (other[0], words[1]) if swapped else (words[0], other[1])
        name = PurePosixPath(frames[0]).parent.name
        tcots = (row.text("query_cot", "").strip(), row.text("pos_cot", "").strip())
        return [_pair(row, mode, human, gpt, Video(frames=tuple(frames)), name, tcots)]

    def _video(self, name: str) -> Video:
        """Frames or file of a video by its name."""
        if not name or PurePosixPath(name).name == BLANK:
            raise RowError("video", f"must name a video; got {show(name)}")
        root = Path(self.media_root).expanduser().resolve()
        folder = (root / self.frames_dir / name).resolve()
        if not folder.is_relative_to(root):
            raise RowError("video", f"the path leaves the media root {root}; got {show(name)}")
        if folder.is_dir():
            return Video(frames=tuple(self._frames(folder, root, name)))
        for file in (folder, *(folder.with_name(folder.name + suffix) for suffix in VIDEO_SUFFIXES)):
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                return Video(path=file.relative_to(root).as_posix())
        raise RowError(
            "video", f"neither a folder of frames nor a video file at {self.frames_dir}/{name} in the media root"
        )

    def _frames(self, folder: Path, root: Path, name: str) -> Sequence[str]:
        names = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES)]
        if not names:
            raise RowError("video", f"the folder {self.frames_dir}/{name} has no frames ({', '.join(IMAGE_SUFFIXES)})")
        names.sort(key=natural_key)
        kept = frame_indices(len(names), self.frames or len(names))
        return [(folder / names[index]).relative_to(root).as_posix() for index in kept]


def frame_indices(total: int, count: int) -> list[int]:
    """`count` of 0..total-1 as the reference draws them, int(linspace(0, total - 1, count)); all if there are fewer."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [0]
    return [index * (total - 1) // (count - 1) for index in range(count)]


def _pair(
    row: RawRow, mode: str, human: str, gpt: str, video: Video, name: str, tcots: tuple[str, str] = ("", "")
) -> PairRecord:
    if mode == "video_retrieval":
        caption = split_instruction(gpt, FIND_VIDEO)[1]
        is_prompt = human.startswith(UNDERSTAND_VIDEO.rstrip(":"))
        instruction = FIND_VIDEO
        query = Item(text=caption, tcot=tcots[0])
        target = Item(video=video, instruction=human if is_prompt else UNDERSTAND_VIDEO, tcot=tcots[1])
    else:
        question = split_instruction(human, VIDEO_QUESTION)[1] if mode == "qa" else ""
        instruction = VIDEO_QUESTION if mode == "qa" else human
        query, target = Item(text=question, video=video, tcot=tcots[0]), Item(text=gpt, tcot=tcots[1])
    return PairRecord(
        pair_id=row.pair_id(),
        data_source=row.shard.source,
        instruction=instruction,
        query=query,
        target=target,
        target_id=answer_id(gpt) if mode == "qa" else f"video:{name}",
    )


def _turns(value: Any, field: str, need: str = "both") -> tuple[str, str]:
    """(what the human says, what gpt says), of each the first turn; the mark of the video is taken out.

    Args:
        need: "human", "gpt" or "both": what must be there and not empty.
    """
    if not isinstance(value, list) or not value:
        raise RowError(field, f"must be a list of turns {{from, value}}; got {show(value)}")
    said: dict[str, str] = {}
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise RowError(f"{field}[{index}]", f"must be a turn {{from, value}}; got {show(turn)}")
        speaker = as_text(turn.get("from"), f"{field}[{index}].from")
        if speaker not in said:
            said[speaker] = as_text(turn.get("value"), f"{field}[{index}].value").replace(VIDEO_MARK, "").strip()
    for speaker in ("human", "gpt") if need == "both" else (need,):
        if not said.get(speaker):
            raise RowError(
                field, f"must have a turn of {speaker} with a text; got turns of {', '.join(said) or 'none'}"
            )
    return said.get("human", ""), said.get("gpt", "")


def _side(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(field, f"must be an object {{conversations, video}}; got {show(value)}")
    return {"conversations": value.get("conversations"), "video": value.get("video")}


def _frame_paths(value: Any, field: str) -> list[str]:
    """Paths of frames: a string or a list; null, "" and a blank picture are none."""
    if value is None:
        return []
    paths = [as_text(part, field).strip() for part in (value if isinstance(value, list) else [value])]
    return [path for path in paths if path and PurePosixPath(path).name != BLANK]


def _only(value: Any, field: str) -> Any:
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError(field, f"must be one video; got a list of {len(value)}")
        return value[0]
    return value


def _named_mode(file: str) -> str | None:
    name = PurePosixPath(file).name
    return next((mode for mode, source in MODES.items() if name.startswith(source)), None)


def _first(root: InputRoot, name: str) -> str:
    files = root.files(f"**/{name}", f"**/{name}.gz")
    if not files:
        raise DataError(f"no {name} in the input; it comes with ShareGPTVideo/train_video_and_instruction")
    return files[0]
