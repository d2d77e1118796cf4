# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show FILE...`: a static HTML page of records, with everything that can be seen to be wrong.

The page is one file without anything from outside: media with boxes drawn, key frames outlined, the pieces of evidence
as the Embedder gets them, T-CoTs in parts, and problems. It is written even if every record is broken, so the exit code
is 0; `embedrl data check` is the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedrl_verl.errors import ConfigError

if TYPE_CHECKING:
    from embedrl_verl.report.evidence import TcotReader
    from embedrl_verl.report.examine import Examiner
    from embedrl_verl.report.page import PageHead
    from embedrl_verl.report.recipe import RecipeLimits
    from embedrl_verl.report.rows import RowIndex
    from embedrl_verl.report.views import CardView

DEFAULT_FAMILY = "qwen2_vl"
FACT_FILES = 5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `show` to `embedrl data`; `run` carries it out."""
    from embedrl_verl.report.recipe import add_options

    show = commands.add_parser("show", help="an HTML page of records: media, boxes, key frames, T-CoTs, problems")
    show.add_argument("files", nargs="+", metavar="FILE", help="parquet file of pair records, or data set folder")
    show.add_argument("--out", metavar="HTML", help="page to write (name of the first FILE with .html, here)")
    show.add_argument("--limit", type=int, default=50, metavar="N", help="records to show (50)")
    how = show.add_mutually_exclusive_group()
    how.add_argument("--seed", type=int, metavar="N", help="draw records at random; without it they are evenly spaced")
    how.add_argument("--pair-id", nargs="+", metavar="ID", help="show these records")
    show.add_argument("--only", choices=["problems"], help="look through --scan records, show those with a fault")
    show.add_argument("--scan", type=int, default=2000, metavar="N", help="records that --only looks through (2000)")
    show.add_argument("--tokenizer", metavar="DIR", help="the Reasoner's folder; tells what is too long")
    show.add_argument("--boxes", choices=["relative_1000", "absolute"], help="units of boxes, if not the family's")
    show.add_argument(
        "--verdicts", metavar="FILE", help="of embedrl data filter (verdicts.parquet in the folder of FILE, or near it)"
    )
    show.add_argument("--max-mib", type=float, default=20.0, metavar="MIB", help="limit of the page's size (20)")
    show.add_argument("--picture-side", type=int, default=640, metavar="PX", help="longest side of a picture (640)")
    add_options(show)


def run(args: argparse.Namespace) -> int:
    """Write the page and tell what is on it; returns 0.

    Raises:
        ConfigError: options that cannot work, or a file at --out that is no such page.
        DataError: a file cannot be read or holds no pair records, or an id is not there.
    """
    from embedrl_verl.curate.verdict_file import verdict_files_of, verdicts_of
    from embedrl_verl.data.files import write_atomically
    from embedrl_verl.report.page import MIN_MIB, render_page
    from embedrl_verl.report.recipe import limits_of
    from embedrl_verl.report.rows import choose, ids_of, index_rows, rows_with_ids

    for name, least in (("limit", 1), ("scan", 1), ("picture_side", 32), ("max_mib", MIN_MIB)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}")
    out = Path(args.out or f"{Path(args.files[0]).resolve().stem}.html")
    _check_is_ours(out)
    limits = limits_of(args)
    index = index_rows(args.files, limits.media_root)
    if args.pair_id:
        chosen = rows_with_ids(index, args.pair_id)
    else:
        chosen = choose(index, args.scan if args.only else args.limit, args.seed)
    verdict_files = [Path(args.verdicts)] if args.verdicts else verdict_files_of(index.files)
    verdicts = verdicts_of(verdict_files, ids_of(index, chosen)) if verdict_files else None
    examiner = replace(_examiner(args, limits), verdicts=verdicts)
    cards = _Cards(index, chosen, examiner, args.limit if args.only else None)
    page = render_page(
        _head(args, index, chosen, examiner.reader, verdict_files),
        cards,
        expected=min(args.limit, len(chosen)) if args.only else len(chosen),
        max_mib=args.max_mib,
        max_side=args.picture_side,
        late_notes=lambda: cards.notes(args),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.html)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error})") from error
    size = len(page.html.encode()) / 1e6
    print(f"{out}: {page.cards} of {len(index)} records, {page.faults} with a fault, {size:.1f} MB")
    if page.left_out or page.pictures_left_out:
        print(f"left out for --max-mib: {page.left_out} records, {page.pictures_left_out} pictures")
    return 0


class _Cards:
    """Cards of the chosen rows, those with a fault only if `faults` (how many of them) is given."""

    def __init__(self, index: RowIndex, chosen: list[int], examiner: Examiner, faults: int | None) -> None:
        self._index, self._chosen, self._examiner, self._faults = index, chosen, examiner, faults
        self.examined = 0

    def __iter__(self) -> Iterator[CardView]:
        from tqdm import tqdm

        from embedrl_verl.report.lengths import default_threads, in_threads
        from embedrl_verl.report.rows import read_rows

        found = 0
        rows = read_rows(self._index, self._chosen)
        cards = in_threads(self._examiner.card, rows, default_threads())
        for card in tqdm(cards, total=len(self._chosen), desc="reading records", unit="record", disable=None):
            self.examined += 1
            if self._faults is None:
                yield card
            elif card.has_problem:
                yield card
                found += 1
                if found == self._faults:
                    return

    def notes(self, args: argparse.Namespace) -> list[str]:
        if self._faults is None:
            return []
        return [
            f"Only records with a fault are shown: {self.examined:,} records were looked through (--scan {args.scan})."
        ]


def _examiner(args: argparse.Namespace, limits: RecipeLimits) -> Examiner:
    from embedrl_verl.families import box_convention, family_of, token_side
    from embedrl_verl.report.evidence import TcotReader
    from embedrl_verl.report.examine import Examiner

    meter = None
    if args.tokenizer is not None:
        from embedrl_verl.report.lengths import LengthMeter

        meter = LengthMeter.from_pretrained(args.tokenizer, limits)
        family = meter.family
    else:
        family = family_of(DEFAULT_FAMILY if limits.data.family == "auto" else limits.data.family)
    reader = TcotReader(
        convention=args.boxes or box_convention(family),
        limits=limits.data.limits(token_side(family)),
        min_side=limits.min_side,
        max_aspect=limits.max_aspect,
        max_evidence=limits.max_evidence,
    )
    return Examiner(reader, limits.data.max_frames, meter)


def _head(
    args: argparse.Namespace, index: RowIndex, chosen: list[int], reader: TcotReader, verdict_files: list[Path]
) -> PageHead:
    from embedrl_verl.report.page import PageHead

    names = [str(file) for file in args.files]
    more = f" and {len(names) - FACT_FILES} more" if len(names) > FACT_FILES else ""
    if args.pair_id:
        how = "by pair id"
    elif len(chosen) == len(index):
        how = "all"
    else:
        how = "evenly spaced in each source" if args.seed is None else f"random in each source, seed {args.seed}"
    units = {
        "relative_1000": "0 to 1000 of width and height",
        "absolute": "pixels of the image as the Reasoner saw it",
    }[reader.convention]
    facts = [
        ("files", ", ".join(names[:FACT_FILES]) + more),
        ("records", f"{len(index):,}"),
        ("chosen", how),
        ("boxes are read as", units),
    ]
    if verdict_files:
        facts.append(("relevance verdicts of", ", ".join(map(str, verdict_files[:FACT_FILES]))))
    if args.tokenizer:
        facts.append(("lengths by", str(args.tokenizer)))
    title = ", ".join(Path(name).resolve().name for name in names[:3]) + (" …" if len(names) > 3 else "")
    return PageHead(title, tuple(facts), tuple(index.counts().items()))


def _check_is_ours(out: Path) -> None:
    """Refuse to replace a file that this command has not written."""
    from embedrl_verl.report.page import GENERATOR

    if not out.exists():
        return
    if not out.is_file() or GENERATOR.encode() not in out.read_bytes()[:4096]:
        raise ConfigError(f"{out} exists and is not a page of `embedrl data show`; name another file with --out")
