# SPDX-License-Identifier: Apache-2.0
"""`embedrl report RUN`: one HTML file about a run or an evaluation: what it is, curves, the reward's terms, Hit@1 by
data source, and cases that RL fixed and broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.report import chart
from embedrl_verl.report.cases import TCOTS, CaseReader, Evaluated, evaluated, written_of
from embedrl_verl.report.page import PageHead, rendered
from embedrl_verl.report.run import TITLES, read_run
from embedrl_verl.report.show import page_to_write, write_page
from embedrl_verl.report.views import CardView


def report_run(
    run: str,
    out: str | None,
    *,
    cases: int = 6,
    data: Sequence[str] | None = None,
    media_root: str | None = None,
    max_mib: float = 20.0,
    picture_side: int = 640,
) -> None:
    """Write the page and print what is on it.

    Args:
        run: folder of a run, or of an evaluation (`embedrl eval --out`).
        out: page to write; None: report.html in the run's folder.
        cases: to show of each kind, fixed and broken.
        data: pair files of the evaluation, media_root: of their paths; None: as the run has noted.

    Raises:
        DataError: the folder is neither, or one of its files cannot be read.
    """
    folder = Path(run)
    view = read_run(folder)
    page = page_to_write(out or str(folder / "report.html"))
    said, groups, reader = list[str](), dict[str, list[Evaluated]](), None
    try:
        if not (folder / TCOTS).is_file():
            raise DataError(f"there is no {TCOTS}, which an evaluation with T-CoTs writes")
        groups = _groups(evaluated(folder), said, cases)
        reader = CaseReader.of(folder, "val_files", data, media_root)
    except (ConfigError, DataError) as error:  # the other parts stand without the cases
        said.append(f"No case can be shown: {error}.")
    body = rendered("report", sections=view.sections, missing=view.missing, cases=said, frame=chart)
    head = PageHead(f"Report of {folder.resolve().name}", view.facts, body=body)
    cards = _cards(reader, groups) if reader else iter(())
    total = sum(map(len, groups.values())) if reader else 0
    write_page(page, head, cards, total, max_mib=max_mib, max_side=picture_side)


def _groups(pairs: Sequence[Evaluated], said: list[str], limit: int) -> dict[str, list[Evaluated]]:
    """Cases under their headings, of every data source in turn; what they are is `said`."""
    if not pairs:
        return {}
    first, last = (TITLES.get(view, view) for view in pairs[0].compared)
    said.append(
        f"Fixed: the target has rank 1 with {last}, but not with {first}. Broken: the other way round. "
        "0: not retrieved."
    )
    groups = {}
    for kind in ("fixed", "broken"):
        seen, placed = Counter[str](), list[tuple[int, Evaluated]]()
        for pair in pairs:
            if pair.change == kind:
                placed.append((seen[pair.source], pair))
                seen[pair.source] += 1
        shown = [pair for _, pair in sorted(placed, key=lambda one: one[0])[:limit]]
        groups[f"{kind.capitalize()}: {len(placed):,} of {len(pairs):,} pairs, {len(shown)} shown"] = shown
        by_source = ", ".join(f"{source} {count}" for source, count in seen.items())
        said.append(f"{kind.capitalize()}: {len(placed):,} of {len(pairs):,} pairs{f' ({by_source})' if seen else ''}.")
    return groups


def _cards(reader: CaseReader, groups: dict[str, list[Evaluated]]) -> Iterator[CardView]:
    for heading, pairs in groups.items():
        for number, (pair, card) in enumerate(zip(pairs, reader.cards(written_of(pairs)), strict=True)):
            ranks = ", ".join(f"{TITLES.get(view, view)} {rank}" for view, rank in pair.ranks.items())
            yield replace(card, facts=(("ranks:", ranks), *card.facts), heading="" if number else heading)
