# SPDX-License-Identifier: Apache-2.0
"""`embedrl data check`: read every row, load every medium as a rollout would, and with a tokenizer count every prompt.

A table by data source has the number of different queries and targets; ids that contradict the contents are noted.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.identity import content_id, false_negative_share
from embedrl_verl.data.inspection import PairInspector
from embedrl_verl.data.schema import SIDES, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable, Problem
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import ConfigError, DataError, MediaError
from embedrl_verl.families import family_of

FEW_NEGATIVES = 0.5
UNKNOWN_SOURCE = "(unreadable)"


@dataclass
class _Source:
    """What the table has of one data source. `contents`: int64, four a pair, see `_inspected`."""

    pairs: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    contents: array[int] = field(default_factory=lambda: array("q"))


def check_pairs(
    files: Iterable[str],
    settings: MediaConfig,
    media_root: str | None,
    tokenizer: str | None,
    max_prompt_length: int | None,
    *,
    default_family: str,
) -> int:
    """Check the files and print the report. Returns 0, or 3 if a row or file cannot be used.

    Args:
        media_root: of all files; None: as their data cards say.
        tokenizer: folder of the Reasoner; without it no prompt is counted, and `default_family` stands in for "auto".
        max_prompt_length: limit of a prompt in tokens.
    """
    if tokenizer is not None:
        from embedrl_verl.data.lengths import PromptMeter  # imports verl

        meter = PromptMeter.from_pretrained(tokenizer, settings.family)
        inspector = PairInspector(settings, meter.family, media_root, meter)
    elif max_prompt_length is not None:
        raise ConfigError("--max-prompt-length counts tokens and needs --tokenizer DIR, the Reasoner's folder")
    else:
        family = family_of(default_family if settings.family == "auto" else settings.family)
        inspector = PairInspector(settings, family, media_root, meter=None)
    table, problems = PairTable.readable(files, media_root)
    bad_rows = table.problems() if table else {}

    def look(number: int) -> tuple[LocatedPair | Problem, list[int], list[Problem]]:
        assert table is not None
        if number in bad_rows:
            return bad_rows[number], [], [bad_rows[number]]
        found = table[number]
        assert isinstance(found, LocatedPair)
        # The records go, which may hold their media; a source keeps numbers.
        here = replace(inspector, media_root=table.media_root(number))
        return found, *_inspected(found, here, max_prompt_length)

    sources: dict[str, _Source] = defaultdict(_Source)
    rows_in_all = len(table) if table else 0
    looked = in_threads(look, range(rows_in_all), default_threads())
    for found, contents, bad in tqdm(looked, total=rows_in_all, desc="checking pairs", unit="pair", disable=None):
        problems += bad
        if isinstance(found, LocatedPair):
            source = sources[found.record.data_source]
            source.pairs += 1
            source.kinds[f"{input_kind(found.record, 'query')} > {input_kind(found.record, 'target')}"] += 1
            source.contents.extend(contents)
    rows = {(problem.file, problem.row): problem.data_source or UNKNOWN_SOURCE for problem in problems}
    for name, count in Counter(rows.values()).items():
        sources[name].bad = count
    _print_report(sources, problems)
    return DataError.exit_code if problems else 0


def _inspected(
    pair: LocatedPair, inspector: PairInspector, max_prompt_length: int | None
) -> tuple[list[int], list[Problem]]:
    """The pair's `ContentId`, and what it would be without the record's ids; empty if a medium cannot be used. And what
    is wrong."""
    without = replace(pair.record, query_id="", target_id="")
    try:
        facts = inspector.inspect(pair)
        own = facts.content if without == pair.record else content_id(without, inspector.media_root)
    except MediaError as error:
        return [], [Problem(pair.file, pair.row, str(error), pair.record.data_source)]
    overlong = {} if max_prompt_length is None else facts.overlong(max_prompt_length)
    return [*facts.content, *own], [
        Problem(
            pair.file,
            pair.row,
            f"{pair}, field {side}: prompt has {tokens} tokens, over the limit of {max_prompt_length}",
            pair.record.data_source,
        )
        for side, tokens in overlong.items()
    ]


def _print_report(sources: dict[str, _Source], problems: list[Problem]) -> None:
    width = max([len("data source"), *map(len, sources)])
    print(f"{'data source':{width}}  {'pairs':>8}  {'bad rows':>8}  {'queries':>8}  {'targets':>8}  {'same':>6}  kinds")
    notes = []
    for name, source in sorted(sources.items()):
        kinds = ", ".join(f"{kind} ({count})" for kind, count in source.kinds.most_common())
        query, target, *own = np.array(source.contents, np.int64).reshape(-1, 4).T
        distinct = f"{len(np.unique(query)):>8}  {len(np.unique(target)):>8}"
        same = false_negative_share(query, target)
        print(f"{name:{width}}  {source.pairs:>8}  {source.bad:>8}  {distinct}  {same:>6.1%}  {kinds}")
        if same >= FEW_NEGATIVES:
            notes.append(
                f"NOTE {name}: two of its pairs have the same query or target {same:.0%} of the time, so a batch has "
                "few negatives, and a retrieval reward or loss little to teach. Is an id one value for all?"
            )
        for side, stated, content in zip(SIDES, (query, target), own, strict=True):
            several = len(np.unique(np.stack((content, stated)), axis=1).T) - len(np.unique(content))
            if several:
                notes.append(
                    f"NOTE {name}: equal content of the {side} stands under different {side}_ids ({several} ids too "
                    f"many), so such pairs are negatives of each other. Leave {side}_id empty, or fill it with embedrl "
                    "data content-ids --overwrite"
                )
    print("same: probability that another pair of the source has the same query or target (never a negative)")
    for line in [*notes, *(f"BAD {problem.message}" for problem in problems)]:
        print(line)
    print(f"{sum(source.pairs for source in sources.values())} pairs, {len(problems)} problem(s)")
