# SPDX-License-Identifier: Apache-2.0
"""Runs tasks of a benchmark with one model: embeds every query and every candidate once a view, ranks, writes.

A view of a side is its items alone ("plain") or with T-CoTs ("tcot"); a cell is a view of the queries against a view of
the candidates, so a run with T-CoTs has up to four: "tcot-plain" are queries with, candidates without.

In the folder of a run are `run.json` (models and rules) and, for each task, `TASK.json` (scores and stamp),
`TASK.parquet` (a row for each query and cell) and `tcots/TASK.{query,candidate}.jsonl`. `TASK.json` is written last: a
task that has one is not computed again, nor are T-CoTs written again that are there, or in the `.part` of a killed run.
Both are refused if they are of another table entry; T-CoTs also if they are of other rows.
With `retry_failed` a task with failed items is, and what has no T-CoT is asked for again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from embedrl_verl.data.files import read_object, sha256_of, write_atomically, write_json
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.pool import RunTasks, run_tasks
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb
from embedrl_verl.evaluation.benchmarks.ranking import score_queries
from embedrl_verl.evaluation.benchmarks.readers import READERS
from embedrl_verl.evaluation.benchmarks.stamp import Stamp
from embedrl_verl.evaluation.benchmarks.task import MakeItem, Rules, Source, Task, TaskData
from embedrl_verl.evaluation.benchmarks.tcot_files import read_tcots, tcot_line
from embedrl_verl.evaluation.retrieval import stacked
from embedrl_verl.evaluation.stamp import ModelFacts
from embedrl_verl.model import Ask, EmbedRLModel, Written, ask_for
from embedrl_verl.model.pair import Encoding

BENCHMARKS: Mapping[str, Any] = {mmeb_v2.NAME: mmeb_v2, uvrb.NAME: uvrb}
RUN_FILE = "run.json"
AT_ONCE = 32
"""Items whose media are in memory at a time."""
SMALLEST_SIDE, SMALL_IMAGE = 28, (56, 56)
"""Images of image tasks with a shorter side, in pixels, are made this large, as the reference does."""
SideName = Literal["query", "candidate"]
SIDES: tuple[SideName, SideName] = ("query", "candidate")


def read_task(task: Task, source: Source, rules: Rules) -> TaskData:
    """The queries and candidates of a task."""
    reader = uvrb.read_set if task.reader == "uvrb" else READERS[task.reader]
    data = reader(task, source, rules)
    if rules.limit is not None:
        data = _limited(data, rules.limit, is_local=task.is_local and rules.pool == "table")
    if not data.queries:
        raise DataError(f"{task.name} must have queries; {source.root / task.repo} holds none")
    if not any(query.grades for query in data.queries):
        raise DataError(
            f"{task.name} must have relevant candidates; no query has one. Do ids of queries and of qrels match? The "
            f"first query is {data.queries[0].id!r}"
        )
    for query in data.queries:
        own = data.items if query.candidates is None else query.candidates
        if missing := [name for name in query.grades if name not in own]:
            raise DataError(
                f"{task.name}: query {query.id} must have its relevant candidates among its candidates; "
                f"{missing[0]!r} is not"
            )
    return data


def _limited(data: TaskData, limit: int, *, is_local: bool) -> TaskData:
    """The first queries, with all candidates of a task, or with their own."""
    queries = data.queries[:limit]
    if not is_local:
        return TaskData(queries, data.items)
    own = {name for query in queries for name in query.candidates or ()}
    return TaskData(queries, {name: make for name, make in data.items.items() if name in own})


@dataclass(frozen=True)
class Vectors:
    """Of one view of one side: (n, D) float32, a row of NaN where there is none, and by number why there is none."""

    rows: Tensor
    problems: dict[int, str]


class BenchmarkRun:
    """The folder of a run, and how its tasks are computed.

    Args:
        benchmark: mmeb_v2 or uvrb; or the name of the `tasks` that are given.
        load: loads what embeds when it is needed; with a Reasoner if T-CoTs are to be written. For workers it can be
            pickled.
        out: folder of the score files.
        tcots: a folder of `TASK.{query,candidate}.jsonl` with {"id", "tcot"} lines (a side without a file is plain
            only); "write": the model's Reasoner writes them; None: plain only.
        facts: of the model, for the stamps.
        made_by: names of the models and how they are asked, which a folder's score files must agree on.
        retry_failed: compute tasks again whose score file has failed items.
        said: told of each task that begins, where it is computed, and of each that is done.
    """

    def __init__(
        self,
        benchmark: str,
        load: Callable[[], EmbedRLModel],
        source: Source,
        out: str | Path,
        *,
        rules: Rules | None = None,
        tcots: str | Path | None = None,
        facts: ModelFacts | None = None,
        made_by: Mapping[str, object] | None = None,
        tasks: Mapping[str, Task] | None = None,
        retry_failed: bool = False,
        said: Callable[[str], object] | None = None,
    ) -> None:
        self.benchmark = benchmark
        self.tasks: Mapping[str, Task] = BENCHMARKS[benchmark].TASKS if tasks is None else tasks
        self._load, self.source, self.out = load, source, Path(out)
        self.rules, self.tcots, self.facts = rules or Rules(), tcots, facts or ModelFacts()
        self.retry_failed, self._said = retry_failed, said or str
        mode = "none" if tcots is None else "written" if tcots == "write" else f"given {Path(tcots).name}"
        self.made_by = {**(made_by or {}), "tcots": mode}

    @cached_property
    def model(self) -> EmbedRLModel:
        """Loaded by now."""
        return self._load()

    def look(self, names: Sequence[str] = ()) -> tuple[dict[str, dict[str, Any]], list[Task]]:
        """The score files that are there of tasks (none: all) by name, and the tasks that are to be computed."""
        if unknown := sorted(set(names) - set(self.tasks)):
            raise ConfigError(f"tasks must be of {self.benchmark}; {', '.join(unknown)} are not")
        if (self.out / RUN_FILE).is_file():
            self._claim()
        found, left = {}, []
        for task in (self.tasks[name] for name in dict.fromkeys(names or self.tasks)):
            known = self._known(task) if (self.out / f"{task.name}.json").is_file() else None
            if known is None or (self.retry_failed and has_failed_items(known)):
                left.append(task)
            else:
                found[task.name] = known
        return found, left

    def run(self, names: Sequence[str] = (), run: RunTasks = run_tasks, workers: int = 1) -> dict[str, dict[str, Any]]:
        """The score files of tasks (none: all) by name; those that are not there are computed and written, each by one
        of the workers."""
        found, left = self.look(names)
        of = len(found) + len(left)
        self.out.mkdir(parents=True, exist_ok=True)  # which workers of other nodes must see
        for name, one in run(BenchmarkRun.compute, self, iter(left), min(workers, len(left))) if left else ():
            found[name] = one
            self._said(f"{name} is done: {len(found)} of {of}")
        return {name: found[name] for name in names or self.tasks}

    def _known(self, task: Task) -> dict[str, Any]:
        """The score file that is there, of what would be computed now."""
        file = self.out / f"{task.name}.json"
        found, mine = read_object(file), self._made_of(task)
        _refuse_other(file, found.get("made_of", mine), mine)  # older files do not say
        return found

    def _made_of(self, task: Task) -> dict[str, str]:
        """What makes a score, and is not of the whole run: the entry of the task, and T-CoTs that are given."""
        found = {"task": task.said(), "metric": task.metric, "is_local": str(task.is_local)}
        if self.tcots not in (None, "write"):
            files = {side: Path(str(self.tcots)) / f"{task.name}.{side}.jsonl" for side in SIDES}
            found |= {f"T-CoTs of {side}": sha256_of(file) for side, file in files.items() if file.is_file()}
        return found

    def _claim(self) -> None:
        """Write what makes this run what it is to `run.json`, or find it there."""
        file = self.out / RUN_FILE
        mine: dict[str, Any] = {"benchmark": self.benchmark, **self.made_by, "revision": self.source.revision}
        mine |= asdict(self.rules) | asdict(self.facts)
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, mine)
        known = read_object(file)
        for name in mine:
            if known.get(name) != mine[name]:
                raise ConfigError(
                    f"{self.out} must be of this run; its {name} is {known.get(name)!r}, not {mine[name]!r}. Choose "
                    "another folder"
                )

    def _stamp(self, task: Task, source: Source, queries: int = 0, candidates: int = 0) -> dict[str, str]:
        return asdict(
            Stamp.of(
                self.benchmark,
                task,
                self.rules,
                self.facts,
                data=source.digest,
                revision=source.revision,
                queries=queries,
                candidates=candidates,
            )
        )

    def compute(self, task: Task) -> tuple[str, dict[str, Any]]:
        """The name and the score file of a task, which is written."""
        if self.model.reasoner is None and self.tcots == "write":
            raise ConfigError("T-CoTs can only be written by a Reasoner; name one, or a folder of T-CoTs")
        self._claim()  # after the models: what cannot be loaded claims no folder
        source = Source(self.source.root, self.source.revision)
        data = read_task(task, source, self.rules)
        is_local = task.is_local and self.rules.pool == "table"
        most = max(len(query.candidates or ()) for query in data.queries) if is_local else len(data.items)
        stamp = self._stamp(task, source, len(data.queries), most)
        if self.tcots == "write":
            self._claim_tcots(task, stamp)
        self._said(f"{task.name}: {len(data.queries)} queries, {len(data.items)} candidates")
        views = {side: dict(self._views(task, data, side)) for side in SIDES}
        cells: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        for query_view, queries in views["query"].items():
            for view, candidates in views["candidate"].items():
                cell, names = f"{query_view}-{view}", list(data.items)
                one_each = queries.rows, candidates.rows, data.queries, names, task.metric
                values = score_queries(*one_each, is_local=is_local)
                cells[cell] = _summary(values, task, names, data, queries, candidates)
                rows += _rows(cell, values, task, data, queries)
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table)
        (self.out / task.name).parent.mkdir(parents=True, exist_ok=True)  # MMEB-V3's names have slashes
        write_atomically(self.out / f"{task.name}.parquet", table.getvalue())
        result = {"task": task.name, "stamp": stamp, "metric": task.metric, "made_of": self._made_of(task)}
        result |= {"cells": cells}
        write_json(self.out / f"{task.name}.json", result)
        return task.name, result

    def _claim_tcots(self, task: Task, stamp: Mapping[str, str]) -> None:
        """Write what the T-CoTs of a task are about, or find it there: their ids are often numbers of rows."""
        file, mine = self.out / "tcots" / f"{task.name}.json", {name: stamp[name] for name in ("data", "task")}
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, mine)
        _refuse_other(file, read_object(file), mine)

    def _views(self, task: Task, data: TaskData, side: SideName) -> Iterator[tuple[str, Vectors]]:
        makes = {query.id: query.item for query in data.queries} if side == "query" else data.items
        if len(makes) < len(data.queries) and side == "query":
            raise DataError(f"{task.name}: the ids of queries must be unique; some are there twice")
        yield "plain", _vectors(list(self._encoded(task, makes, side, None)), list(makes), f"{task.name}: no {side}")
        given, kept = None, self.out / "tcots" / f"{task.name}.{side}.jsonl"
        if self.tcots is None:
            return
        if self.tcots != "write":
            files = {one: Path(self.tcots) / f"{task.name}.{one}.jsonl" for one in SIDES}
            if not any(file.is_file() for file in files.values()):
                raise DataError(f"{self.tcots} must have T-CoTs of {task.name}: {files[side].name} or the other side's")
            if not files[side].is_file():
                return
            given = read_tcots(files[side])
        elif kept.is_file() and not self.retry_failed:
            given = read_tcots(kept)
        encoded = self._written(task, makes, side, kept) if given is None else self._encoded(task, makes, side, given)
        yield "tcot", _vectors(list(encoded), list(makes), f"{task.name}: with T-CoTs no {side}")

    def _written(self, task: Task, makes: Mapping[str, MakeItem], side: SideName, kept: Path) -> list[Encoding]:
        """With T-CoTs that the Reasoner writes. Each goes to a part file at once: a killed run loses a batch."""
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        if kept.is_file():  # with retry_failed; of two lines of an item the last counts
            kept.replace(part)
        lines = part.read_bytes() if part.is_file() else b""
        write_atomically(part, lines[: lines.rfind(b"\n") + 1])  # the last may be torn, within a letter too
        # Failures are tried again: a server may be back.
        known = {name: one for name, one in read_tcots(part).items() if one.text is not None}
        before = {name: make for name, make in makes.items() if name in known}
        rest = {name: make for name, make in makes.items() if name not in known}
        done = dict(zip(before, self._encoded(task, before, side, known), strict=True))
        with open(part, "a", encoding="utf-8") as file:
            for name, one in zip(rest, self._encoded(task, rest, side, None, writes=True), strict=True):
                file.write(tcot_line(name, one))
                file.flush()
                done[name] = one
        write_atomically(kept, "".join(tcot_line(name, done[name]) for name in makes))
        part.unlink(missing_ok=True)  # a worker that was taken for dead may have done it
        return [done[name] for name in makes]

    def _encoded(
        self,
        task: Task,
        makes: Mapping[str, MakeItem],
        side: SideName,
        tcots: Mapping[str, Written] | None,
        *,
        writes: bool = False,
    ) -> Iterator[Encoding]:
        """Of each item in order: with the T-CoTs given, with those that the Reasoner `writes`, else alone."""
        none = Written(None, problem="no T-CoT is given for it")
        about = f"{task.name}, {side} {'plain' if tcots is None and not writes else 'tcot'}"
        encoded = self.model.encodings(
            [partial(self._ask, task, make, side) for make in makes.values()],
            "query" if side == "query" else "target",
            batch_size=AT_ONCE,
            think="always" if writes else "never",
            tcots=None if tcots is None else [tcots.get(name, none) for name in makes],
        )
        yield from tqdm(encoded, total=len(makes), desc=about, disable=None)

    def _ask(self, task: Task, make: MakeItem, side: SideName) -> Ask:
        item = load_item(make(), self.source.root, max_frames=self.rules.frames)
        if task.modality == "image":
            item = _not_tiny(item)
        ask = ask_for(item, "query" if side == "query" else "target")
        is_text_to_video = ask.kind == "query_text" and task.finds_video
        return Ask("query_text_to_video", item) if is_text_to_video else ask


def _not_tiny(item: LoadedItem) -> LoadedItem:
    images = (one if min(one.size) >= SMALLEST_SIDE else one.resize(SMALL_IMAGE) for one in item.images)
    return replace(item, images=tuple(images))


def _vectors(encoded: Sequence[Encoding], names: Sequence[str], none: str) -> Vectors:
    """`none`: the start of the error if no item has a vector, as a score would be of nothing."""
    problems = {number: one.problem for number, one in enumerate(encoded) if one.vector is None}
    if 0 < len(encoded) == len(problems):
        raise DataError(
            f"{none} has a vector: {problems[0]} ({names[0]}, the first of {len(names)}). Mend it and repeat the "
            "command with --retry-failed"
        )
    return Vectors(stacked(encoded), problems)


def has_failed_items(score_file: Mapping[str, Any]) -> bool:
    """Whether a cell has items without a vector."""
    return any(any(cell["failed"].values()) for cell in score_file["cells"].values())


def _summary(
    values: Mapping[str, Tensor],
    task: Task,
    names: Sequence[str],
    data: TaskData,
    queries: Vectors,
    candidates: Vectors,
) -> dict[str, Any]:
    """A cell of a score file: the task's score and the official 26 numbers in [0, 1]; `optimistic`: the score if ties
    counted for the model."""
    metrics: dict[str, float] = {name: float(one.mean()) for name, one in values.items() if "@" in name}
    counts = {"num_pred": len(data.queries), "num_data": len(data.queries)}
    failed = {"query": len(queries.problems), "candidate": len(candidates.problems)}
    problems = [f"query {data.queries[number].id}: {why}" for number, why in queries.problems.items()]
    problems += [f"candidate {names[number]}: {why}" for number, why in candidates.problems.items()]
    return {
        "score": metrics[task.metric],
        "optimistic": float(values["optimistic"].mean()),
        "failed": failed,
        "problems": problems[:5],
        "metrics": metrics | counts,
    }


def _rows(
    cell: str, values: Mapping[str, Tensor], task: Task, data: TaskData, queries: Vectors
) -> Iterator[dict[str, Any]]:
    columns = {name: values[name].tolist() for name in dict.fromkeys(("hit@1", "hit@10", "ndcg_linear@5", task.metric))}
    for number, (query, rank) in enumerate(zip(data.queries, values["rank"].tolist(), strict=True)):
        row = {"cell": cell, "query": query.id, "rank": int(rank), "problem": queries.problems.get(number, "")}
        yield row | {name: column[number] for name, column in columns.items()}


def _refuse_other(file: Path, known: Mapping[str, str], mine: Mapping[str, str]) -> None:
    for name in dict.fromkeys([*known, *mine]):
        if known.get(name) != mine.get(name):
            raise ConfigError(
                f"{file} must be of this task; its {name} is {known.get(name)!r}, not {mine.get(name)!r}. Remove "
                "it, or choose another folder"
            )
