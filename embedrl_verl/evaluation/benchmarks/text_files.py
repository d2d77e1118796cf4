# SPDX-License-Identifier: Apache-2.0
"""Texts in three files, as MMEB-V3's text and tool tasks have them: queries, candidates, and relevance (qrels).

Sets name their columns differently; the first of each list that a row has is read. Without qrels a query has the ids of
its relevant candidates itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from embedrl_verl.data.schema import Item
from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.task import Rules, Source, Task, TaskData

QUERY_ID = ("_id", "id", "qid", "query_id", "query-id")
QUERY = ("text", "query", "query_content", "short_query")
CANDIDATE_ID = ("_id", "id", "doc_id", "document_id", "corpus-id")
CANDIDATE = ("text", "content", "documentation")
OF_QUERY = ("query_id", "query-id", "qid", "q_id")
OF_CANDIDATE = ("corpus_id", "corpus-id", "doc_id", "document_id", "p_id")
RELEVANT = ("gold_ids", "gold_ids_long", "label", "labels")
# Which of a row's instructions belongs to the query, by set; other sets have one or none.
INSTRUCTIONS = {"InfoSearch": "instruction_changed", "FollowIR": "instruction_og"}


def read_texts(task: Task, source: Source, rules: Rules) -> TaskData:
    """Candidates are those of the whole file."""
    query_file, candidate_file, qrels_file = task.files
    data, said = TaskData(), rules.for_target(task.target_instruction)
    for number, row in enumerate(source.rows("", file=candidate_file)):
        where = f"{candidate_file}, row {number}"
        title = row.get("title") or ""
        text = "" if title and not any(row.get(one) for one in CANDIDATE) else _as_text(_first(row, CANDIDATE, where))
        text = "\n".join(part for part in (title, text) if part)
        name = str(_first(row, CANDIDATE_ID, where))
        data.items.setdefault(name, partial(Item, text=rules.text(text), instruction=said))
    grades: dict[str, dict[str, float]] = {}
    for number, row in enumerate(source.rows("", file=qrels_file)) if qrels_file else ():
        where = f"{qrels_file}, row {number}"
        grade = _grade(row, where)
        if grade > 0:
            own, name = grades.setdefault(str(_first(row, OF_QUERY, where)), {}), str(_first(row, OF_CANDIDATE, where))
            own[name] = max(own.get(name, 0.0), grade)
    for number, row in enumerate(source.rows("", file=query_file)):
        where = f"{query_file}, row {number}"
        name = str(_first(row, QUERY_ID, where))
        relevant = grades.get(name, {}) if qrels_file else dict.fromkeys(_ids(row, where), 1.0)
        asked = row.get(INSTRUCTIONS.get(task.group, "instruction")) or task.instruction
        text = rules.text(str(_first(row, QUERY, where)))
        data.ask(partial(Item, text=text, instruction=asked), (), relevant, is_local=False, query_id=name)
    return data


def _first(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise DataError(f"{where} must have one of the columns {', '.join(names)}, not empty; it has {', '.join(row)}")


def _as_text(value: Any) -> str:
    """A document of a tool is a JSON object, whose text is that of its ASCII form."""
    try:
        found = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
    except ValueError:
        return str(value)
    return json.dumps(found) if isinstance(found, dict) else str(found)


def _grade(row: Mapping[str, Any], where: str) -> float:
    """1 where qrels have no column of grades."""
    for name in ("label", "score"):
        if name in row:
            try:
                return float(row[name])
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: {name} must be a number; got {row[name]!r}") from error
    return 1.0


def _ids(row: Mapping[str, Any], where: str) -> list[str]:
    """Ids, or objects with an `id`, in a list or in the JSON of one."""
    found = _first(row, RELEVANT, where)
    try:
        found = json.loads(found) if isinstance(found, str) else found
        found = found if isinstance(found, list) else [found]
        return [str(one["id"] if isinstance(one, dict) else one) for one in found]
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: {' or '.join(RELEVANT)} must list ids of candidates; got {found!r}") from error
