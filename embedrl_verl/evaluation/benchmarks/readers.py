# SPDX-License-Identifier: Apache-2.0
"""Readers of MMEB-V2 and of tables in its layout: each makes of the rows queries, candidates by name, and relevance."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from embedrl_verl.data.schema import Item
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.task import MakeItem, Rules, Source, Task, TaskData
from embedrl_verl.evaluation.benchmarks.text_files import read_texts

Row = Mapping[str, Any]


def _rows(task: Task, source: Source) -> Any:
    return source.rows(task.repo, task.config, task.split, columns=task.columns, file=task.file or None)


def read_image(task: Task, source: Source, rules: Rules) -> TaskData:
    """The first of a row's targets is the positive. Where query and target are images, a candidate is its picture and
    its caption (RefCOCO-Matching has several objects of one picture), else its picture, or its text."""
    data, (query_form, target_form) = TaskData(), task.form
    for number, row in enumerate(_rows(task, source)):
        options: list[tuple[str, MakeItem]] = []
        texts, paths = (_several(row, column, f"{task.name}, row {number}") for column in ("tgt_text", "tgt_img_path"))
        for text, path in zip_longest(texts, paths, fillvalue=""):
            if "I" not in target_form:
                said = rules.for_target(task.target_instruction)
                options.append((text, partial(Item, text=text, instruction=said)))
                continue
            name = f"{path}:" + text.strip('"') if "I" in query_form and text else path
            said = rules.for_target(rules.text(row["tgt_inst"] or "").strip() or task.target_instruction)
            options.append((name, partial(_picture, task, path, rules.text(text), said)))
        if not options:
            raise DataError(f"{task.name}, row {number}: tgt_text or tgt_img_path must have a target; both are empty")
        text = rules.text(row["qry_text"] or "")
        said = rules.text(row["qry_inst"] or "").strip() or task.instruction
        query = partial(Item, text=text, instruction=said)
        if "I" in query_form:
            query = partial(_picture, task, row["qry_img_path"], text, said)
        data.ask(query, options, [options[0][0]], is_local=task.is_local)
    return data


def _several(row: Row, column: str, where: str) -> list[str]:
    found = row[column] or []
    if isinstance(found, str):  # each letter would be a candidate
        raise DataError(f"{where}: {column} must be a list; got {found[:60]!r}")
    return list(found)


def _in_media(task: Task, path: str) -> str:
    return f"{task.media}/{path}" if task.media else path


def _picture(task: Task, path: str, text: str, instruction: str) -> Item:
    return Item(text=text, images=(_in_media(task, path),), kind=task.kind, instruction=instruction)


def _clip(task: Task, source: Source, rules: Rules, folder: str, text: str = "", instruction: str = "") -> Item:
    return Item(text=text, video=rules.clip(source.root, _in_media(task, folder)), instruction=instruction)


def read_labels(task: Task, source: Source, rules: Rules) -> TaskData:
    """Video classification: against the row's own labels, or all of `labels/TASK.txt` and of the rows."""
    rows = _rows(task, source)
    if task.is_local:  # the set has more rows than the benchmark takes
        rows = rows.select(range(min(task.queries or len(rows), len(rows))))
    data = TaskData()
    said = rules.for_target(task.target_instruction)
    for label in source.lines(f"labels/{task.name}.txt"):
        data.items[label] = partial(Item, text=label, instruction=said)
    for number, row in enumerate(rows):
        query = partial(_clip, task, source, rules, str(row["video_id"]), "", task.instruction)
        labels = _several(row, "neg_text", f"{task.name}, row {number}") if task.is_local else [row["pos_text"]]
        options = [(label, partial(Item, text=label, instruction=said)) for label in labels]
        data.ask(query, options, [row["pos_text"]], is_local=task.is_local)
    return data


class _Question(NamedTuple):
    """The folder of the clip, the question with what follows it, (name, text) of the options, and the right one's
    number."""

    folder: str
    text: str
    options: list[tuple[str, str]]
    answer: int


def _lettered(options: list[str]) -> list[str]:
    return [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def _without_letter(option: str) -> str:
    return option.partition(". ")[2].strip(". ") or option


def _mvbench(row: Row) -> _Question:
    options = _lettered(row["candidates"])
    text = row["question"] + "\nOptions:\n" + "\n".join(options)
    names = [(option, option) for option in options]
    return _Question(f"{row['subset']}/{row['video']}", text, names, row["candidates"].index(row["answer"]))


def _video_mme(row: Row) -> _Question:
    options = [(option, _without_letter(option)) for option in row["options"]]
    text = row["question"] + "\n" + "\n".join(row["options"])
    return _Question(row["videoID"], text, options, "ABCD".index(row["answer"]))


def _nextqa(row: Row) -> _Question:
    options = [row[f"a{number}"] for number in range(5)]
    text = row["question"] + "\nOptions:\n" + "\n".join(_lettered(options))
    return _Question(str(row["video"]), text, [(option, option) for option in options], int(row["answer"]))


def _egoschema(row: Row) -> _Question:
    options = [(option, _without_letter(option)) for option in row["option"]]
    return _Question(row["video_idx"], row["question"] + " ".join(row["option"]), options, int(row["answer"]))


def _activitynet(row: Row) -> _Question:
    options = ["yes", "no"]
    names = [(option, option) for option in options]
    return _Question(
        f"v_{row['video_name']}", row["question"] + "? (A) yes; (B) no.", names, options.index(row["answer"])
    )


_QUESTIONS: Mapping[str, Callable[[Row], _Question]] = {
    "MVBench": _mvbench,
    "Video-MME": _video_mme,
    "NExTQA": _nextqa,
    "EgoSchema": _egoschema,
    "ActivityNetQA": _activitynet,
}


def read_questions(task: Task, source: Source, rules: Rules) -> TaskData:
    """Video QA: the options are in the query too."""
    data = TaskData()
    for row in _with_subset(task, source):
        asked = _QUESTIONS[task.name](row)
        query = partial(_clip, task, source, rules, asked.folder, rules.text(asked.text), task.instruction)
        options = [(name, partial(Item, text=text)) for name, text in asked.options]
        data.ask(query, options, [asked.options[asked.answer][0]], is_local=task.is_local)
    return data


def _with_subset(task: Task, source: Source) -> Iterator[Row]:
    """The rows of all configs of a task ("a,b"), each with the name of its config."""
    for config in (task.config or "").split(","):
        for row in _rows(replace(task, config=config or None), source):
            yield {**row, "subset": config}


def read_captions(task: Task, source: Source, rules: Rules) -> TaskData:
    """Text to video: the columns of the clip (its name is the file's without folder and ending) and of the text, of
    which a list's first is used."""
    clip, caption = task.columns
    data = TaskData()
    for row in _rows(task, source):
        text = row[caption] if isinstance(row[caption], str) else row[caption][0]
        name = posixpath.splitext(posixpath.basename(row[clip]))[0] if clip == "video" else row[clip]
        target = partial(_clip, task, source, rules, name, "", rules.for_target(task.target_instruction))
        query = partial(Item, text=rules.text(text), instruction=task.instruction)
        data.ask(query, [(name, target)], [name], is_local=False)
    return data


def read_moments(task: Task, source: Source, rules: Rules) -> TaskData:
    """The clips are folders beside the whole video, which is `query`; the positive's name begins so."""
    data, said = TaskData(), rules.for_target(task.target_instruction)
    for row in _rows(task, source):
        name = posixpath.splitext(posixpath.basename(row["video_path"]))[0]
        folder = source.root / task.media / name
        found = sorted(one.name for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
        clips = [f"{name}/{clip}" for clip in found if clip != "query"]
        positives = [clip for clip in clips if Path(clip).name.startswith("positive")]
        if not positives:
            raise DataError(f"{task.name}: {folder} must hold the frames of the clips, one named positive...")
        options = [(clip, partial(_clip, task, source, rules, clip, "", said)) for clip in clips]
        query = partial(_clip, task, source, rules, f"{name}/query", rules.text(row["query"]), task.instruction)
        data.ask(query, options, positives, is_local=task.is_local)
    return data


MOMENT_SEEKER = {
    ".mp4": "Find the clip that corresponds to the given sentence and video segment:",
    ".jpg": "Select the video clip that aligns with the given text and image:",
    "": "Find the clip that corresponds to the given text:",
}


def read_moment_seeker(task: Task, source: Source, rules: Rules) -> TaskData:
    """The ending of `input_frames` says what stands beside the text; several clips may be right."""
    data, said = TaskData(), rules.for_target(task.target_instruction)
    for row in _rows(task, source):
        text, given = rules.text(row["query"]), row["input_frames"] or ""
        ending = next(ending for ending in MOMENT_SEEKER if given.endswith(ending))
        query = partial(Item, text=text, instruction=MOMENT_SEEKER[ending])
        if ending == ".mp4":
            query = partial(_clip, task, source, rules, _clip_folder(given), text, MOMENT_SEEKER[ending])
        elif ending == ".jpg":
            query = partial(_picture, task, f"query_{given}", text, MOMENT_SEEKER[ending])
        right, wrong = ([one["output_path"] for one in row[f"{which}_frames"]] for which in ("positive", "negative"))
        options = [
            (path, partial(_clip, task, source, rules, _clip_folder(path), "", said)) for path in (*right, *wrong)
        ]
        data.ask(query, options, right, is_local=task.is_local)
    return data


def _clip_folder(path: str) -> str:
    return "video_frames/" + path.replace("/", "_").partition(".mp4")[0]


def read_pages(task: Task, source: Source, rules: Rules) -> TaskData:
    """BEIR layout. Scores above 0 are relevant; of a pair that is there twice the larger counts."""
    data, said = TaskData(), rules.for_target(task.target_instruction)
    corpus = source.rows(task.repo, "corpus", task.split, columns=("corpus-id", "image"))
    grades: dict[str, dict[str, float]] = {}
    for row in source.rows(task.repo, "qrels", task.split, columns=("query-id", "corpus-id", "score")):
        own = grades.setdefault(str(row["query-id"]), {})
        page = str(row["corpus-id"])
        if row["score"] > 0:
            own[page] = max(own.get(page, 0.0), float(row["score"]))
    for number, name in enumerate(corpus["corpus-id"]):
        data.items.setdefault(str(name), partial(_page, corpus, number, said))
    for row in source.rows(task.repo, "queries", task.split, columns=("query-id", "query")):
        query = partial(Item, text=rules.text(row["query"]), instruction=task.instruction)
        own = grades.get(str(row["query-id"]), {})
        data.ask(query, (), own, is_local=False, query_id=str(row["query-id"]))
    return data


def _page(corpus: Any, number: int, instruction: str) -> Item:
    image = corpus[number]["image"]
    content = image["bytes"] or Path(image["path"]).read_bytes()
    return Item(images=(content,), kind="page", instruction=instruction)


READERS: Mapping[str, Callable[[Task, Source, Rules], TaskData]] = {
    "image": read_image,
    "labels": read_labels,
    "questions": read_questions,
    "captions": read_captions,
    "moments": read_moments,
    "moment_seeker": read_moment_seeker,
    "pages": read_pages,
    "texts": read_texts,
}
