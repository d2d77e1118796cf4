# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show`: a static HTML page of records, with everything that can be seen to be wrong.

The page is one file without anything from outside: media with boxes drawn, key frames outlined, the pieces of evidence
as the Embedder gets them, T-CoTs in parts, and problems. It is written even if every record is broken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from embedrl_verl.curate.verdict_file import verdict_files_of, verdicts_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import ConfigError
from embedrl_verl.families import BoxConvention, box_convention, family_of, token_side
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.examine import Examiner
from embedrl_verl.report.lengths import LengthMeter
from embedrl_verl.report.page import GENERATOR, PageHead, render_page
from embedrl_verl.report.recipe import RecipeLimits
from embedrl_verl.report.rows import choose, ids_of, index_rows, read_rows, rows_with_ids
from embedrl_verl.report.views import CardView

FACT_FILES = 5
UNITS = {
    "relative_1000": "0 to 1000 of width and height",
    "absolute": "pixels of the image as the Reasoner saw it",
}


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
    """Write the page and print what is on it; arguments as the options of the command.

    Args:
        default_family: where neither the limits nor a tokenizer say.
    """
    page = Path(out or f"{Path(files[0]).resolve().stem}.html")
    if page.exists() and not (page.is_file() and GENERATOR.encode() in page.read_bytes()[:4096]):
        raise ConfigError(f"{page} exists and is not a page of `embedrl data show`; name another file with --out")
    index = index_rows(files, limits.media_root)
    how = "by pair id"
    if pair_id:
        chosen = rows_with_ids(index, pair_id)
    else:
        chosen = choose(index, scan if only else limit, seed)
        how = "evenly spaced in each source" if seed is None else f"random in each source, seed {seed}"
        how = "all" if len(chosen) == len(index) else how
    verdict_files = [Path(verdicts)] if verdicts else verdict_files_of(index.files)
    found = verdicts_of(verdict_files, ids_of(index, chosen)) if verdict_files else None
    meter = None if tokenizer is None else LengthMeter.from_pretrained(tokenizer, limits)
    named = default_family if limits.data.family == "auto" else limits.data.family
    family = family_of(named) if meter is None else meter.family
    reader = TcotReader(
        convention=boxes or box_convention(family),
        limits=MediaLimits.of(limits.data, token_side(family), limits.data.max_frames),
        min_side=limits.min_side,
        max_aspect=limits.max_aspect,
        max_evidence=limits.max_evidence,
    )
    examiner = Examiner(reader, limits.data.max_frames, meter, found)
    looked = 0

    def cards() -> Iterator[CardView]:
        nonlocal looked
        shown = 0
        made = in_threads(examiner.card, read_rows(index, chosen), default_threads())
        for card in tqdm(made, total=len(chosen), desc="reading records", unit="record", disable=None):
            looked += 1
            if not only or card.has_problem:
                yield card
                shown += 1
            if only and shown == limit:
                return

    def notes() -> list[str]:
        looked_through = f"{looked:,} records were looked through (--scan {scan})"
        return [f"Only records with a fault are shown: {looked_through}."] if only else []

    names = ", ".join(files[:FACT_FILES])
    facts = [
        ("files", names if len(files) <= FACT_FILES else f"{names} and {len(files) - FACT_FILES} more"),
        ("records", f"{len(index):,}"),
        ("chosen", how),
        ("boxes are read as", UNITS[reader.convention]),
    ]
    if verdict_files:
        facts.append(("relevance verdicts of", ", ".join(map(str, verdict_files[:FACT_FILES]))))
    if tokenizer:
        facts.append(("lengths by", tokenizer))
    title = ", ".join(Path(name).resolve().name for name in files[:3]) + (" …" if len(files) > 3 else "")
    rendered = render_page(
        PageHead(title, tuple(facts), tuple(index.counts().items())),
        cards(),
        expected=min(limit, len(chosen)) if only else len(chosen),
        max_mib=max_mib,
        max_side=picture_side,
        late_notes=notes,
    )
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, rendered.html)
    except OSError as error:
        raise ConfigError(f"--out {page}: cannot be written ({error})") from error
    size = len(rendered.html.encode()) / 1e6
    print(f"{page}: {rendered.cards} of {len(index)} records, {rendered.faults} with a fault, {size:.1f} MB")
    if rendered.left_out or rendered.pictures_left_out:
        print(f"left out for --max-mib: {rendered.left_out} records, {rendered.pictures_left_out} pictures")
