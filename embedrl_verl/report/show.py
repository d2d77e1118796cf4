# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show`: a static HTML page of records, with everything that can be seen to be wrong. It is written even
if every record is broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from embedrl_verl.annotate.verdict_file import verdict_files_of, verdicts_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.table import PairTable
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import BOX_UNITS, BoxConvention, box_convention, family_of, token_side
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.examine import Examiner
from embedrl_verl.report.lengths import LengthMeter
from embedrl_verl.report.page import GENERATOR, PageHead, render_page
from embedrl_verl.report.recipe import RecipeLimits
from embedrl_verl.report.rows import choose, rows_by_source, rows_with_ids
from embedrl_verl.report.views import CardView

NAMED = 5


def show_records(
    files: Sequence[str],
    out: str | None,
    limits: RecipeLimits,
    *,
    default_family: str,
    limit: int = 50,
    seed: int | None = None,
    pair_id: Sequence[str] | None = None,
    only: Literal["problems"] | None = None,
    scan: int = 2000,
    tokenizer: str | None = None,
    boxes: BoxConvention | None = None,
    verdicts: str | None = None,
    max_mib: float = 20.0,
    picture_side: int = 640,
) -> None:
    """Write the page and print what is on it. `default_family`: where neither the limits nor a tokenizer say."""
    page = Path(out or f"{Path(files[0]).resolve().stem}.html")
    if page.exists() and not (page.is_file() and GENERATOR.encode() in page.read_bytes()[:4096]):
        raise ConfigError(f"{page} exists and is not a page of `embedrl data show`; name another file with --out")
    table = PairTable(files, limits.media_root)
    chosen = rows_with_ids(table, pair_id) if pair_id else choose(table, scan if only else limit, seed)
    how = "evenly spaced in each source" if seed is None else f"random in each source, seed {seed}"
    how = "by pair id" if pair_id else "all" if len(chosen) == len(table) else how
    meter = None if tokenizer is None else LengthMeter.from_pretrained(tokenizer, limits)
    named = default_family if limits.data.family == "auto" else limits.data.family
    family = family_of(named) if meter is None else meter.prompts.family
    convention = boxes or box_convention(family)
    reader = TcotReader(
        convention, MediaLimits.of(limits.data, token_side(family), limits.data.max_frames), limits.evidence
    )
    verdict_files = [Path(verdicts)] if verdicts else verdict_files_of(table.files)
    ids = set(table.column("pair_id").take(chosen).to_pylist()) - {None}
    found = verdicts_of(verdict_files, ids) if verdict_files else None
    examiner = Examiner(reader, limits.data.max_frames, meter, found)

    def cards(numbers: Sequence[int], told: str) -> Iterator[CardView]:
        made = in_threads(lambda row: examiner.card(table[row], table.media_root(row)), numbers, default_threads())
        yield from tqdm(made, total=len(numbers), desc=told, unit="record", disable=None)

    notes: tuple[str, ...] = ()
    if only:
        looked, faulty = 0, list[int]()
        for view in cards(chosen, "looking for faults"):
            faulty += [chosen[looked]] * view.has_fault
            looked += 1
            if len(faulty) == limit:
                break
        notes = (f"Only records with a fault are shown: {looked:,} records were looked through (--scan {scan}).",)
        chosen = faulty  # read again: their media do not stay in memory
    facts = {
        "files": _listed(files),
        "records": f"{len(table):,}",
        "chosen": how,
        "boxes are read as": BOX_UNITS[convention].words,
        "relevance verdicts of": _listed(map(str, verdict_files)),
        "lengths by": tokenizer,
    }
    head = PageHead(
        _listed(Path(name).resolve().name for name in files),
        tuple((name, fact) for name, fact in facts.items() if fact),
        tuple((name, len(rows)) for name, rows in rows_by_source(table).items()),
        notes,
    )
    rendered = render_page(head, cards(chosen, "reading records"), max_mib=max_mib, max_side=picture_side)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, rendered.html)
    except OSError as error:
        raise ConfigError(f"--out {page}: cannot be written ({error})") from error
    size = page.stat().st_size / 1e6
    print(f"{page}: {rendered.cards} of {len(table)} records, {rendered.faults} with a fault, {size:.1f} MB")
    if rendered.left_out or rendered.pictures_left_out:
        print(f"left out for --max-mib: {rendered.left_out} records, {rendered.pictures_left_out} pictures")


def _listed(names: Iterable[str]) -> str:
    several = list(names)
    return ", ".join(several[:NAMED]) + (f" and {len(several) - NAMED} more" if len(several) > NAMED else "")
