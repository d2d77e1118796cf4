# SPDX-License-Identifier: Apache-2.0
"""`embedrl data check FILE...`: is this file of pair records fit for training?

Reads every row, loads every medium as a rollout would, and with --tokenizer counts every prompt. Prints a table by data
source, with the number of different queries and targets, and one line for each row that cannot be used; the exit code
is 3 if there is any, else 0. Ids that contradict the contents are noted.
"""

from __future__ import annotations

import argparse
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedrl_verl.data.files import media_root_of, pair_files
from embedrl_verl.data.identity import content_id, false_negative_share
from embedrl_verl.data.schema import SIDES, input_kind
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.errors import ConfigError, DataError, MediaError
from embedrl_verl.families import family_of

if TYPE_CHECKING:  # the other commands of `embedrl` need not wait for torch
    from embedrl_verl.data.inspection import LocatedPair, PairInspector, Problem

DEFAULT_FAMILY = "qwen2_vl"
FEW_NEGATIVES = 0.5
UNKNOWN_SOURCE = "(unreadable)"


@dataclass
class _SourceCounts:
    """What the table says of one data source. `contents`: int64, four a pair, see `_inspected`."""

    pairs: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    contents: array[int] = field(default_factory=lambda: array("q"))


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `check` to `embedrl data`; `run` carries it out."""
    check = commands.add_parser("check", help="check records, media and prompt lengths; exit code 3 if a row is bad")
    check.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    check.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that media paths are relative to; without it a data set folder's own",
    )
    check.add_argument(
        "--family",
        default="auto",
        help=f"model family of prompts and sizes; auto: of the tokenizer's folder, else {DEFAULT_FAMILY}",
    )
    check.add_argument("--prompt-style", default="paper", help="prompt templates: paper or compact")
    check.add_argument("--tokenizer", metavar="DIR", help="the Reasoner's folder; counts the tokens of every prompt")
    check.add_argument("--max-prompt-length", type=int, metavar="N", help="limit in tokens; needs --tokenizer")
    for name in ("image_min_tokens", "image_max_tokens", "frame_min_tokens", "frame_max_tokens", "max_frames"):
        default = getattr(DataSettings(), name)
        option = "--" + name.replace("_", "-")
        check.add_argument(option, type=int, default=default, metavar="N", help=f"data.embedrl.{name} ({default})")


def run(args: argparse.Namespace) -> int:
    """Check the files and print the report. Returns 0, or 3 if a row or file cannot be used.

    Raises:
        ConfigError: options that contradict each other, or media limits that the processor does not share.
    """
    from tqdm import tqdm

    from embedrl_verl.data.inspection import Problem, default_threads, scan_located
    from embedrl_verl.report.lengths import in_threads

    inspector = _inspector(args)
    roots: dict[str, str | None] = {}

    def problems_of(found: LocatedPair | Problem) -> tuple[tuple[str, str, tuple[int, ...]] | None, list[Problem]]:
        """Source, kinds and contents of a well-formed pair, and what is wrong."""
        if isinstance(found, Problem):
            return None, [found]
        here = replace(inspector, media_root=roots[found.file])
        contents, problems = _inspected(found, here, args.max_prompt_length)
        return (*_seen(found), contents), problems

    def located() -> Iterator[LocatedPair | Problem]:
        for found in scan_located(_files(args.files)):
            if found.file not in roots:
                roots[found.file] = args.media_root or media_root_of(found.file)
            yield found

    counts: dict[str, _SourceCounts] = defaultdict(_SourceCounts)
    problems: list[Problem] = []
    # A few rows at a time: records may hold their media as bytes.
    checked = in_threads(problems_of, located(), default_threads())
    for seen, found in tqdm(checked, desc="checking pairs", unit="pair", disable=None):
        problems += found
        if seen is not None:
            counts[seen[0]].pairs += 1
            counts[seen[0]].kinds[seen[1]] += 1
            counts[seen[0]].contents.extend(seen[2])
    _print_report(counts, problems)
    return DataError.exit_code if problems else 0


def _seen(pair: LocatedPair) -> tuple[str, str]:
    kinds = f"{input_kind(pair.record, 'query')} > {input_kind(pair.record, 'target')}"
    return pair.record.data_source, kinds


def _inspected(
    pair: LocatedPair, inspector: PairInspector, max_prompt_length: int | None
) -> tuple[tuple[int, ...], list[Problem]]:
    """The pair's `ContentId`, and what it would be without the record's ids; empty if a medium cannot be used. And what
    is wrong."""
    from embedrl_verl.data.inspection import Problem

    try:
        facts = inspector.inspect(pair)
        without = replace(pair.record, query_id="", target_id="")
        own = facts.content if without == pair.record else content_id(without, inspector.media_root)
    except MediaError as error:
        return (), [Problem(pair.file, pair.row, str(error), pair.record.data_source)]
    overlong = {} if max_prompt_length is None else facts.overlong(max_prompt_length)
    return (*facts.content, *own), [
        Problem(
            pair.file,
            pair.row,
            f"{pair}, field {side}: prompt has {tokens} tokens, over the limit of {max_prompt_length}",
            pair.record.data_source,
        )
        for side, tokens in overlong.items()
    ]


def _files(paths: Iterable[str]) -> list[str]:
    """The files named, and the parts of the folders named. A file that is not there is a problem, not an error."""
    return [str(file) for path in paths for file in (pair_files([path]) if Path(path).is_dir() else [path])]


def _inspector(args: argparse.Namespace) -> PairInspector:
    from embedrl_verl.data.inspection import PairInspector

    settings = DataSettings(
        family=args.family,
        prompt_style=args.prompt_style,
        image_min_tokens=args.image_min_tokens,
        image_max_tokens=args.image_max_tokens,
        frame_min_tokens=args.frame_min_tokens,
        frame_max_tokens=args.frame_max_tokens,
        max_frames=args.max_frames,
    )
    if args.tokenizer is None:
        if args.max_prompt_length is not None:
            raise ConfigError("--max-prompt-length counts tokens and needs --tokenizer DIR, the Reasoner's folder")
        family = family_of(DEFAULT_FAMILY if args.family == "auto" else args.family)
        return PairInspector(settings, family, args.media_root, meter=None)
    from embedrl_verl.data.lengths import PromptMeter  # imports verl, needed only to count tokens

    meter = PromptMeter.from_pretrained(args.tokenizer, args.family)
    return PairInspector(settings, meter.family, args.media_root, meter)


def _print_report(counts: dict[str, _SourceCounts], problems: list[Problem]) -> None:
    for name, rows in _bad_rows(problems).items():
        counts[name].bad = rows
    width = max([len("data source"), *map(len, counts)])
    head = f"{'data source':{width}}  {'pairs':>8}  {'bad rows':>8}  {'queries':>8}  {'targets':>8}  {'same':>6}  kinds"
    print(head)
    notes = []
    for name, source in sorted(counts.items()):
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
    for note in notes:
        print(note)
    for problem in problems:
        print(f"BAD {problem.message}")
    print(f"{sum(source.pairs for source in counts.values())} pairs, {len(problems)} problem(s)")


def _bad_rows(problems: list[Problem]) -> Counter[str]:
    """Rows with a problem by data source; a row with two problems counts once."""
    rows = {(problem.file, problem.row): problem.data_source or UNKNOWN_SOURCE for problem in problems}
    return Counter(rows.values())
