# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Hound (ShareGPTVideo/train_video_and_instruction) as pair records: videos, in three modes.

python data_preprocess/llava_hound.py --input train_video_and_instruction --preset paper_caps --out data/llavahound

Annotations are lines {id, video, conversations: [{from: "human", value}, {from: "gpt", value}]}:
`video_caption_300k.jsonl`, and `video_240k_caption_15k.jsonl`, whose first 240,000 lines are questions and whose rest
are captions (or `video_qa_240k.jsonl`, those lines cut out). A video is a folder of frames
`<frames dir>/<video>/*.jpeg` under the media root, or a file `<frames dir>/<video>.mp4`.

docs/data.md has the modes: in caption_retrieval and qa the video is in the query, in video_retrieval the caption is.

Embed-RL's copies {dataset_name, qry: {conversations, video}, pos: {conversations, video}, query_cot, pos_cot} are read
too: there a video is a list of frame paths, and the path of a blank picture, `images/blank.jpg`, means "no video on
this side". A file whose name begins with that of a mode (`llavahound_qa_1.jsonl`) is read for this mode alone, another
one for all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.common import answer_id, split_instruction
from embedrl_verl.convert.converter import Converter, RawRow, RowError, Shard, as_text, option, show
from embedrl_verl.convert.inputs import InputRoot, natural_key
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.errors import ConfigError, DataError

VIDEO_QUESTION = "Answer a question based on the content of a video."
FIND_VIDEO = "Find a video that contains the following visual content:"
UNDERSTAND_VIDEO = "Understand the content of the provided video:"

MODES = ("caption_retrieval", "qa", "video_retrieval")
SOURCES = {mode: f"llavahound_{mode}" for mode in MODES}
CAPTIONS, QUESTIONS = "video_caption_300k.jsonl", "video_240k_caption_15k.jsonl"
QUESTIONS_ALONE = "video_qa_240k.jsonl"
BLANK = "blank.jpg"
VIDEO_MARK = "<video>"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


@dataclass(frozen=True)
class LlavaHound(Converter):
    modes: tuple[str, ...] = option(MODES, "data sources (all)", MODES)
    frames_dir: str = option("train_300k", "folder of the videos, relative to the media root")
    frames: int = option(8, "frames named of a folder, evenly spaced; 0 for all")
    question_lines: int = option(240_000, "lines of the second file that are QA")
    embed_rl: bool = option(False, "the input is Embed-RL's copies, one object a line")

    name = "llavahound"
    licence = "apache-2.0 (tag of the hub repository; the videos keep their own terms)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 0 or self.question_lines < 1 or not self.modes:
            got = f"{self.frames}, {self.question_lines} and {', '.join(self.modes) or 'none'}"
            rule = f"frames must not be negative, question_lines positive, and modes some of {', '.join(MODES)}"
            raise ConfigError(f"{rule}; got {got}")

    def shards(self, root: InputRoot) -> list[Shard]:
        if root.media_root is None:
            raise ConfigError("the videos must be in a local folder; name it with --media-root")
        if not self.embed_rl:
            return [self._shard(root, mode) for mode in self.modes]
        files = root.files("**/*.jsonl", "**/*.jsonl.gz")
        if not files:
            raise DataError("no .jsonl; write Embed-RL's lists as one JSON object a line")
        pairs = [(mode, file) for mode in self.modes for file in files if named_mode(file) in (mode, None)]
        return [Shard(file, SOURCES[mode], note=mode) for mode, file in pairs]

    def _shard(self, root: InputRoot, mode: str) -> Shard:
        choices = [(QUESTIONS_ALONE, None), (QUESTIONS, self.question_lines)] if mode == "qa" else [(CAPTIONS, None)]
        for name, stop in choices:
            if files := root.files(f"**/{name}", f"**/{name}.gz"):
                return Shard(files[0], SOURCES[mode], stop, note=mode)
        raise DataError(f"no {name} in the input; it comes with ShareGPTVideo/train_video_and_instruction")

    def convert(self, row: RawRow) -> PairRecord | None:
        if self.embed_rl:
            return from_embed_rl(row)
        human, gpt = turns(row.value("conversations"), "conversations")
        value = row.value("video")
        if isinstance(value, list):
            if len(value) != 1:
                raise RowError("video", f"must be one video; got a list of {len(value)}")
            value = value[0]
        name = as_text(value, "video").strip()
        return pair(row, human, gpt, self._video(name, row.media_root), name)

    def _video(self, name: str, media_root: Path | None) -> Video:
        """Frames or file of a video by its name."""
        if not name or "\0" in name or PurePosixPath(name).name == BLANK:
            raise RowError("video", f"must name a video; got {show(name)}")
        assert media_root is not None
        root = media_root.resolve()
        folder = (root / self.frames_dir / name).resolve()
        if not folder.is_relative_to(root):
            raise RowError("video", f"the path leaves the media root {root}; got {show(name)}")
        if folder.is_dir():
            frames = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES)]
            if not frames:
                raise RowError(
                    "video", f"the folder {self.frames_dir}/{name} has no frames ({', '.join(IMAGE_SUFFIXES)})"
                )
            frames.sort(key=natural_key)
            kept = frame_indices(len(frames), self.frames or len(frames))
            return Video(frames=tuple((folder / frames[index]).relative_to(root).as_posix() for index in kept))
        for file in (folder, *(folder.with_name(folder.name + suffix) for suffix in VIDEO_SUFFIXES)):
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                return Video(path=file.relative_to(root).as_posix())
        place = f"{self.frames_dir}/{name} in the media root"
        raise RowError("video", f"neither a folder of frames nor a video file at {place}")


def named_mode(file: str) -> str | None:
    return next((mode for mode in MODES if PurePosixPath(file).name.startswith(SOURCES[mode])), None)


def from_embed_rl(row: RawRow) -> PairRecord | None:
    """The pair of a row of Embed-RL's copies; None if the row is of another mode."""
    mode, dataset = row.shard.note, row.text("dataset_name")
    if dataset not in SOURCES.values():
        raise RowError("dataset_name", f"must be one of {', '.join(SOURCES.values())}; got {show(dataset)}")
    if dataset != SOURCES[mode]:
        return None
    for side in ("qry", "pos"):
        if not isinstance(row.value(side), Mapping):
            raise RowError(side, f"must be an object {{conversations, video}}; got {show(row.value(side))}")
    # The side of gpt, and the side of the human and the video.
    says, asks = ("qry", "pos") if mode == "video_retrieval" else ("pos", "qry")
    gpt = turns(row.value(says).get("conversations"), f"{says}.conversations", ("gpt",))[1]
    human = turns(row.value(asks).get("conversations"), f"{asks}.conversations", ("human",))[0]
    video = row.value(asks).get("video")
    frames = frame_paths(video, f"{asks}.video")
    if not frames:
        raise RowError(f"{asks}.video", f"the mode {mode} has a video on this side; got {show(video)}")
    if frame_paths(row.value(says).get("video"), f"{says}.video"):
        raise RowError("video", f"the mode {mode} has a video on one side only; got two")
    name = PurePosixPath(frames[0]).parent.name
    tcots = (row.text("query_cot", "").strip(), row.text("pos_cot", "").strip())
    return pair(row, human, gpt, Video(frames=tuple(frames)), name, tcots)


def pair(row: RawRow, human: str, gpt: str, video: Video, name: str, tcots: tuple[str, str] = ("", "")) -> PairRecord:
    mode, target_id = row.shard.note, f"video:{name}"
    if mode == "video_retrieval":
        asks = human if human.startswith(UNDERSTAND_VIDEO.rstrip(":")) else UNDERSTAND_VIDEO
        instruction, query = FIND_VIDEO, Item(text=split_instruction(gpt, FIND_VIDEO)[1], tcot=tcots[0])
        target = Item(video=video, instruction=asks, tcot=tcots[1])
    else:
        instruction, question = human, ""
        if mode == "qa":
            instruction, question, target_id = (
                VIDEO_QUESTION,
                split_instruction(human, VIDEO_QUESTION)[1],
                answer_id(gpt),
            )
        query, target = Item(text=question, video=video, tcot=tcots[0]), Item(text=gpt, tcot=tcots[1])
    return PairRecord(row.pair_id(), row.shard.source, instruction, query, target, target_id)


def turns(value: Any, field: str, needed: tuple[str, ...] = ("human", "gpt")) -> tuple[str, str]:
    """(what the human says, what gpt says), of each the first turn, without the mark of the video; what is needed must
    be there and not empty."""
    if not isinstance(value, list):
        raise RowError(field, f"must be a list of turns {{from, value}}; got {show(value)}")
    said: dict[str, str] = {}
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise RowError(f"{field}[{index}]", f"must be a turn {{from, value}}; got {show(turn)}")
        speaker = as_text(turn.get("from"), f"{field}[{index}].from")
        if speaker not in said:
            said[speaker] = as_text(turn.get("value"), f"{field}[{index}].value").replace(VIDEO_MARK, "").strip()
    for speaker in needed:
        if not said.get(speaker):
            raise RowError(
                field, f"must have a turn of {speaker} with a text; got turns of {', '.join(said) or 'none'}"
            )
    return said.get("human", ""), said.get("gpt", "")


def frame_paths(value: Any, field: str) -> list[str]:
    """Paths of frames: a string or a list; null, "" and a blank picture are none."""
    if value is None:
        return []
    paths = [as_text(part, field).strip() for part in (value if isinstance(value, list) else [value])]
    return [path for path in paths if path and PurePosixPath(path).name != BLANK]


def frame_indices(total: int, count: int) -> list[int]:
    """`count` of 0..total-1 as the reference draws them, int(linspace(0, total - 1, count)); all if there are fewer."""
    if total <= count:
        return list(range(total))
    return [index * (total - 1) // max(count - 1, 1) for index in range(count)]


if __name__ == "__main__":
    sys.exit(convert_main(LlavaHound, __doc__))
