# SPDX-License-Identifier: Apache-2.0
"""UVRB (arXiv 2510.27571): 16 sets of video retrieval, their reader, and both averages that papers print."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain

from embedrl_verl.data.schema import Item, Video
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.task import Rules, Source, Task, TaskData

NAME = "uvrb"
REPO = "Alibaba-NLP/UVRB"

# name, column of the averages, queries, candidates (of a query where l(ocal)), metric, instruction
_SETS = """
MSRVTT|CG|1000|1000|hit@1|Find the clip that corresponds to the described scene in the given video.
DiDeMo|CG|1004|1004|hit@1|Find a video that includes the following described scenes.
CRB-G|CG|1000|1000|hit@1|Find the video according to the general text description.
CRB-S|S|1000|1000|hit@1|Find the video according to the spatial description.
VDC-O|S|1027|1027|hit@1|Find the video according to the object description.
CRB-T|T|1000|1000|hit@1|Find the video according to the temporal description.
CMRB|T|728|1071|hit@10|Find the video according to the camera motion description.
DREAM-E|PR|6251|1000|hit@1|Find the video according to the text description.
LoVR-TH|PR|8854|8854|hit@10|Find the video according to text description about video theme information.
PEV-K|PR|14427|15000|hit@1|Find the video according to the text description of a series of keywords.
LoVR-V|LC|100|467|hit@1|Find the long video according to the long text description.
VDC-D|LC|1000|1027|hit@1|Find the video according to the detailed text description.
MS-TI|CMP|400|10l|precision@1|Find the video clip that corresponds to the given text and the given image.
MS-TV|CMP|400|10l|precision@1|Find the video clip that corresponds to the given text and the given video.
MSRVTT-I2V|VIS|1000|1000|hit@1|Find the video according to the image.
LoVR-C2V|VIS|467|467|hit@1|Find the original long video according to the short video clip.
"""


def _tasks() -> Iterator[Task]:
    for line in _SETS.strip().splitlines():
        name, group, queries, candidates, metric, said = line.split("|")
        yield Task(
            name,
            "video",
            group,
            "uvrb",
            REPO,
            is_local=candidates.endswith("l"),
            queries=int(queries),
            candidates=int(candidates.rstrip("l")),
            instruction=said,
            metric=metric,
            finds_video=True,
        )


TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}


def official_name(task: str) -> str:
    """As the paper has it."""
    return task


def read_set(task: Task, source: Source, rules: Rules) -> TaskData:
    """`FOLDER/jsonl/{queries,corpus,instances}.jsonl`; the folder is named with hyphens or underscores, and holds the
    media.

    Candidates of a query of a local set are its instance's `pos` and `neg`. Where the instances bring no `neg`, the
    set can be ranked with `pool="global"` alone, which is another protocol.
    """
    names = (task.name, task.name.replace("-", "_"))
    folder = next((name for name in names if (source.root / REPO / name).is_dir()), names[-1])

    def rows(file: str, *columns: str) -> list[Mapping[str, object]]:
        return list(source.rows(REPO, columns=columns, file=f"{folder}/jsonl/{file}.jsonl"))

    def item(row: Mapping[str, object], instruction: str) -> Item:
        image, video = row.get("image"), row.get("video")
        return Item(
            text=rules.text(str(row.get("text") or "")),
            images=(f"{REPO}/{folder}/{image}",) if image else (),
            video=_video(source, rules, f"{REPO}/{folder}/{video}") if video else None,
            instruction=instruction,
        )

    data = TaskData()
    for row in rows("corpus", "id", "video"):
        data.items.setdefault(str(row["id"]), partial(item, row, ""))
    queries = {str(row["id"]): row for row in rows("queries", "id")}
    columns = ("qid", "pos", "neg") if task.is_local and rules.pool == "table" else ("qid", "pos")
    for row in rows("instances", *columns):
        lists = {side: [str(name) for name in row.get(side) or ()] for side in ("pos", "neg")}  # type: ignore[attr-defined]
        if unknown := sorted(set(chain(*lists.values())) - set(data.items)):
            raise DataError(f"{task.name}: instances name candidates that the corpus has not: {', '.join(unknown[:5])}")
        options = [(name, data.items[name]) for name in chain(*lists.values())]
        query = str(row["qid"])
        if query not in queries:
            raise DataError(f"{task.name}: instances name the query {query!r}, which queries.jsonl has not")
        make = partial(item, queries[query], task.instruction)
        data.ask(make, options, lists["pos"], is_local=task.is_local, query_id=query)
    return data


def _video(source: Source, rules: Rules, path: str) -> Video:
    """A folder of frames, or a file; its rate is so high that the number of frames does not depend on its length."""
    return rules.clip(source.root, path) if (source.root / path).is_dir() else Video(path=path, fps=1000.0)


_FINE = ("S", "T", "PR")


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The averages of which all sets are there, in the unit of the scores.

    "D-AVG" is the mean over the 16 sets. "FG", "TXT" and "A-AVG" are means of means as the UVRB paper has them;
    "... (flat)" are means over the sets of the column, as the Embed-RL paper has them. The two cannot be compared.
    """
    known = {name.replace("_", "-"): score for name, score in scores.items()}
    if unknown := sorted(set(known) - set(TASKS)):
        raise DataError(f"scores must be of sets of UVRB; {', '.join(unknown)} are none")
    of: dict[str, list[float]] = {}
    complete = {task.group for task in TASKS.values()}
    for task in TASKS.values():
        if task.name in known:
            of.setdefault(task.group, []).append(known[task.name])
        else:
            complete.discard(task.group)
    found = {group: statistics.fmean(of[group]) for group in of if group in complete}
    if set(_FINE) <= complete:
        found["FG"] = statistics.fmean(found[group] for group in _FINE)
        found["FG (flat)"] = statistics.fmean(chain(*(of[group] for group in _FINE)))
    if {*_FINE, "CG", "LC"} <= complete:
        found["TXT"] = statistics.fmean(found[group] for group in ("CG", "FG", "LC"))
        found["TXT (flat)"] = statistics.fmean(chain(*(of[group] for group in (*_FINE, "CG", "LC"))))
    if len(known) == len(TASKS):
        found["D-AVG"] = statistics.fmean(known.values())
        for flat in ("", " (flat)"):
            columns = (f"TXT{flat}", "CMP", "VIS", "CG", f"FG{flat}", "LC")
            found[f"A-AVG{flat}"] = statistics.fmean(found[column] for column in columns)
    return found
