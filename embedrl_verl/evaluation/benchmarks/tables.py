# SPDX-License-Identifier: Apache-2.0
"""Tasks of YAML files in the schema of VLM2Vec's task tables: MMEB-V3, and a user's own data in that layout.

An entry is a task. Its `dataset_parser` says how rows are read, `data_path` (with `subset_name`, a config) where they
lie in the data root; without it the task must be one of MMEB-V2, whose rows lie as in the hub's VLM2Vec/MMEB-V3:

    digits_i2t:
      dataset_parser: image_i2t       # rows as of MMEB-V2's image tasks
      data_path: rows                 # rows/digits_i2t/test.jsonl
      subset_name: digits_i2t
      image_root: media
      eval_type: local                # against the row's own candidates; global: against all of the task

What cannot be read here is listed with its reason, and is never left out in silence.
"""

from __future__ import annotations

import posixpath
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.benchmarks import mmeb_v2
from embedrl_verl.evaluation.benchmarks.ranking import KS
from embedrl_verl.evaluation.benchmarks.task import Task

FORMS = {
    "image_cls": ("I", "T"),
    "image_qa": ("IT", "T"),
    "image_i2t": ("I", "T"),
    "image_t2i": ("T", "I"),
    "image_i2i_vg": ("IT", "I"),
}
TEXTS = {"complex_text_retrieve": ("text", "ndcg_linear@5"), "toolde": ("tool", "hit@1")}
# By parser, of own rows: (reader, modality, columns, metric). Parsers of one public set alone are not among them.
OWN = {
    **dict.fromkeys(FORMS, ("image", "image", mmeb_v2.IMAGE_COLUMNS, "hit@1")),
    "video_classification": ("labels", "video", ("video_id", "pos_text"), "hit@1"),
    "msrvtt": ("captions", "video", ("video_id", "caption"), "hit@1"),
    "moment_retrieval": ("moments", "video", ("query", "video_path"), "hit@1"),
    "vidore": ("pages", "visdoc", (), "ndcg_linear@5"),
}
V2_PARSERS = (
    *FORMS,
    *(
        "ssv2",
        "video_classification",
        "msrvtt",
        "msvd",
        "didemo",
        "youcook2",
        "vatex",
        "moment_retrieval",
        "momentseeker",
    ),
    *("videomme", "nextqa", "egoschema", "mvbench", "activitynetqa", "vidore", "visrag"),
)
REASONS = {
    "gui": "where its rows lie and what its candidates are is in no public table",
    "mcmr": "candidates of joined product fields have no reader here",
    "memory_retrieval": "its layout is not public",
}
# MMEB-V3 keeps video rows in one folder; names that are not the task's own in small letters.
V3_VIDEO = {
    "SmthSmthV2": "ssv2.jsonl",
    "YouCook2": "youcook2-val.jsonl",
    "Charades-STA": "charades_sta.jsonl",
    "MomentSeeker": "momentseeker_1k6.jsonl",
}
V3_PAGES = {"ViDoSeek-page": "ViDoSeek-page", "MMLongBench-page": "MMLongBench"}
METRICS = tuple(f"{name}@{k}" for name in ("hit", "ndcg_linear", "recall", "mrr", "map") for k in KS)
OURS = ("instruction", "target_instruction", "kind", "metric")
USED = (
    *("dataset_parser", "dataset_name", "dataset_split", "data_path", "subset_name", "image_root", "frame_root"),
    *("eval_type", "query_file", "candidate_file", "qrels_file", *OURS),
)
UNUSED = (
    *("video_root", "clip_root", "max_frames_saved", "max_video_frames_saved", "max_clip_frames_saved"),
    *("num_frames", "num_video_frames", "num_clip_frames", "num_negative_clips", "num_sample_per_subset"),
)
"""Of making frames, which are there already, or said by --frames and --limit."""


@dataclass(frozen=True)
class Tables:
    """Tasks by name, and why the others of the files are none."""

    tasks: dict[str, Task] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    def averages(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Plain means of modalities, and "All" if every entry can be read, of which all tasks are in the scores."""
        columns: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            columns.setdefault(task.modality, []).append(name)
        if not self.unsupported:
            columns["All"] = list(self.tasks)
        return {
            name: statistics.fmean(scores[task] for task in tasks)
            for name, tasks in columns.items()
            if all(task in scores for task in tasks)
        }


def read_tables(*paths: str | Path) -> Tables:
    """The tasks of YAML files, and of all *.yaml of folders."""
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    found, entry_of = Tables(), dict[str, Any]()
    for file in files:
        try:
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"--tables {file} must be a YAML file of tasks: {error}") from error
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ConfigError(f"--tables {file} must hold tasks by name, each with a dataset_parser")
        for name, entry in entries.items():
            if entry_of.setdefault(name, entry) != entry:
                raise ConfigError(
                    f"{file}: names of tasks must be unique; {name} is another task in another file. Name the "
                    "files that you mean (--tables may be given again)"
                )
            task = _task(str(name), entry, f"{file}: {name}")
            if isinstance(task, Task):
                found.tasks[task.name] = task
            else:
                found.unsupported[str(name)] = task
    path = " ".join(map(str, paths))
    if not found.tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.unsupported.items())
        raise ConfigError(f"--tables {path} must hold a task that can be read; {reasons or 'it has none at all'}")
    return found


def _task(name: str, entry: Mapping[str, Any], where: str) -> Task | str:
    """The task of an entry, or why it is none."""
    parser = str(entry.get("dataset_parser"))
    if parser not in TEXTS and parser not in V2_PARSERS:
        audio = "audio is no modality of the pair" if "audio" in entry or "audio_root" in entry else ""
        return audio or REASONS.get(parser, f"dataset_parser {parser} has no reader here")
    if unknown := sorted(set(entry) - {*USED, *UNUSED}):
        raise ConfigError(f"{where}: keys must be {', '.join((*USED, *UNUSED))}; got {', '.join(unknown)}")
    if entry.get("eval_type") not in ("local", "global"):
        raise ConfigError(f"{where}: eval_type must be local or global; got {entry.get('eval_type')!r}")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or posixpath.normpath(name) != name or name in ("run", "scores", "."):
        raise ConfigError(f"{where}: a task's name becomes the name of its score file; choose another")
    ours: dict[str, Any] = {one: str(entry[one]) for one in OURS if one in entry}
    if ours.get("kind", "page") != "page" or ours.get("metric", METRICS[0]) not in METRICS:
        raise ConfigError(f"{where}: kind must be page, and metric one of {', '.join(METRICS)}")
    is_local = entry["eval_type"] == "local"
    if is_local and (parser in TEXTS or OWN.get(parser, ("",))[0] in ("captions", "pages")):
        return "its eval_type is local, and rows of this parser have no candidates of their own"
    if parser in TEXTS:
        modality, metric = TEXTS[parser]
        files = tuple(_inside(entry, one, where) for one in ("query_file", "candidate_file", "qrels_file"))
        if not all(files[:2]):
            return "it names no query_file and candidate_file"
        group = name.split("/")[-2] if "/" in name else ""
        return replace(Task(name, modality, group, "texts", "", metric=metric, files=files), **ours)
    media = _inside(entry, "image_root", where) or _inside(entry, "frame_root", where)
    if entry.get("data_path"):
        if parser not in OWN:
            return f"dataset_parser {parser} reads one public set; own rows can be of {', '.join((*OWN, *TEXTS))}"
        reader, modality, columns, metric = OWN[parser]
        columns += ("neg_text",) if reader == "labels" and is_local else ()
        task = Task(name, modality, "", reader, _inside(entry, "data_path", where), metric=metric, columns=columns)
        task = replace(task, config=_inside(entry, "subset_name", where) or None)
        task = replace(task, split=str(entry.get("dataset_split", "test")))
        task = replace(task, form=FORMS.get(parser, ("T", "T")), finds_video=reader in ("captions", "moments"))
    elif name in mmeb_v2.TASKS:
        task = _of_v3(mmeb_v2.TASKS[name])
    else:
        return "it is no task of MMEB-V2, and no data_path says where its rows lie"
    return replace(task, media=media, is_local=is_local, **ours)


def _inside(entry: Mapping[str, Any], key: str, where: str) -> str:
    path = PurePosixPath(str(entry.get(key) or ""))
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{where}: {key} must be relative to the data root; got {entry[key]}")
    return str(path) if path.parts else ""


def _of_v3(task: Task) -> Task:
    """A task of MMEB-V2 with its rows as MMEB-V3 has them."""
    if task.modality == "image":
        return replace(task, repo="image-query")
    if task.modality == "visdoc":
        last = V3_PAGES.get(task.name, task.repo.rpartition("/")[2])
        return replace(task, repo=f"visdoc-tasks/data/{last}")
    if task.name == "MVBench":
        return replace(task, repo="video-tasks/data/mvbench")
    return replace(task, repo="video-tasks/data", file=V3_VIDEO.get(task.name, f"{task.name.lower()}.jsonl"))
