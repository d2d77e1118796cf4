# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as a function: ask about all sides, put the data set together, write its card."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from embedrl_verl import __version__
from embedrl_verl.annotate.assemble import PartCounts, assemble
from embedrl_verl.annotate.backends import Backend
from embedrl_verl.annotate.chunks import ChunkedInput
from embedrl_verl.annotate.journal import summary_of
from embedrl_verl.annotate.progress import Progress, RunnerSettings
from embedrl_verl.annotate.report import Prices, lines, summary
from embedrl_verl.annotate.runner import Asker, Runner, journal_header, journal_path
from embedrl_verl.annotate.tcots import TcotAsker
from embedrl_verl.annotate.workfolder import WorkFolder
from embedrl_verl.data.files import (
    FORMAT,
    REJECTED_FILE,
    disk_errors,
    input_facts,
    licences_of,
    part_facts,
    part_name,
    write_atomically,
)
from embedrl_verl.errors import DataError

_LOG_EVERY_S = 30.0


@dataclass(frozen=True)
class AnnotateJob:
    """One annotation.

    Attributes:
        files: parquet files of pair records.
        out: data set folder to write.
        asker: settings and wording.
        backend: who answers.
        runner: how the run goes.
        keep_failed: see `assemble`.
        chunk_rows: rows of a part.
        prices: for the report.
        command: goes on with the job.
    """

    files: Sequence[Path]
    out: Path
    asker: TcotAsker
    backend: Backend
    runner: RunnerSettings
    keep_failed: bool = False
    chunk_rows: int = 2048
    prices: Prices = field(default_factory=Prices)
    command: Sequence[str] = ()

    def run(self, say: Callable[[str], None] = print) -> int:
        """Do what is left to do. Returns 0, or 3 if a row of the input cannot be used.

        Raises:
            ConfigError: settings that cannot work, or others than the folder was begun with.
            DataError: unreadable input, or a share of bad rows or failed sides above its limit.
            EmbedRLError: servers are lost, or the disk is full; run again to go on.
        """
        source = ChunkedInput(self.files, self.chunk_rows)
        settings = {
            "command": "data annotate",
            "input": source.fingerprint,
            "chunk_rows": self.chunk_rows,
            "keep_failed": self.keep_failed,
            **self.asker.described(),
        }
        with WorkFolder(self.out, settings, self.command) as work:
            if work.is_finished:
                work.check_wanted(self.backend.wanted())
                say(f"{self.out} is finished; nothing to do")
                return DataError.exit_code if (self.out / REJECTED_FILE).stat().st_size else 0
            ask_about_all(work, source, self.asker, self.backend, self.runner, label="annotate", unit="side")
            with _bar("write", source.rows, "row") as bar:
                counts = assemble(source, work.path, self.out, keep_failed=self.keep_failed, report=bar.update)
            if not counts.totals["pairs"]:
                raise DataError(f"{self.out}: no pair is left; see failed.jsonl and rejected.jsonl there")
            with disk_errors(self.out):
                card = self._card(work, source, counts)
                write_atomically(self.out / "data_card.md", card_page(card))
                work.finish(card)
        for line in lines(counts, self.prices):
            say(line)
        say(f"wrote {counts.totals['pairs']:,} of {source.rows:,} pairs to {self.out}")
        return DataError.exit_code if counts.totals["rejected_rows"] else 0

    def _card(self, work: WorkFolder, source: ChunkedInput, counts: PartCounts) -> dict[str, Any]:
        media_root = self.asker.prompts.media_root
        parts = [self.out / part_name(chunk.number) for chunk in source.chunks]
        return {
            "format": FORMAT,
            "name": "annotated pairs",
            "tool": f"embedrl-verl {__version__}: data annotate",
            "licence": licences_of(self.files),
            "records": counts.totals["pairs"],
            "media_root": os.path.relpath(Path(media_root).resolve(), self.out.resolve()) if media_root else None,
            "by_source": {source: {"records": found["pairs"]} for source, found in sorted(counts.sources.items())},
            "rejected": {"rows": counts.totals["rejected_rows"]},
            "input": [input_facts(file) for file in self.files],
            "served": work.known_served(),
            "settings": work.settings,
            "annotation": summary(counts, self.prices),
            "parts": [part_facts(part, pq.read_metadata(part).num_rows) for part in parts],
        }


def ask_about_all(
    work: WorkFolder,
    source: ChunkedInput,
    asker: Asker,
    backend: Backend,
    settings: RunnerSettings,
    *,
    label: str,
    unit: str,
) -> None:
    """Complete the journals of a work folder; nothing is asked, and nobody has to serve, if they are complete."""
    complete = all(
        summary_of(journal_path(work.path, chunk), journal_header(work.hash, chunk)) for chunk in source.chunks
    )
    if not complete or work.known_served() is None:
        asyncio.run(_ask(work, source, asker, backend, settings, label, unit))
    else:
        work.check_wanted(backend.wanted())
        # shares may have other limits than when the journals were completed
        progress = Progress()
        for chunk in source.chunks:
            progress.add(summary_of(journal_path(work.path, chunk), journal_header(work.hash, chunk)) or {})
        progress.check(settings, final=True)


async def _ask(
    work: WorkFolder,
    source: ChunkedInput,
    asker: Asker,
    backend: Backend,
    settings: RunnerSettings,
    label: str,
    unit: str,
) -> None:
    try:
        work.served(await backend.meet())
        with _bar(label, None, unit) as bar:
            start = last = time.monotonic()

            def report(progress: Progress) -> None:
                nonlocal last
                shown = {"failed": progress.failed.total(), "replies": progress.replies}
                bar.set_postfix(shown, refresh=False)
                bar.update(progress.errands - bar.n)
                if bar.disable and time.monotonic() - last > _LOG_EVERY_S:
                    last = time.monotonic()
                    rate = progress.replies / (last - start)
                    print(
                        f"{label}: {progress.errands:,} {unit}s done, {shown['failed']} failed, {rate:.1f} replies/s, "
                        f"{progress.completion_tokens / (last - start):,.0f} reply tokens/s",
                        file=sys.stderr,
                        flush=True,
                    )

            await Runner(source, asker, backend, work.path, work.hash, settings, report).run()
    finally:
        await backend.aclose()


def _bar(label: str, total: int | None, unit: str) -> Any:
    return tqdm(desc=label, total=total, unit=unit, disable=not sys.stderr.isatty())


def card_page(card: Mapping[str, Any]) -> str:
    """The data card for people."""
    annotation = card["annotation"]
    rows = [
        f"| {source} | {found.get('pairs', 0):,} | {found.get('sides_with_tcot', 0):,} | "
        f"{found.get('sides_failed', 0):,} | {found.get('sides_with_gold', 0):,} | "
        f"{found.get('completion_tokens', 0):,} |"
        for source, found in annotation["by_source"].items()
    ]
    refused = [f"- {count:,} x {rule}" for rule, count in annotation["refused_replies"].items()] or ["- none"]
    return "\n".join(
        [
            "# Annotated pairs",
            "",
            f"{card['records']:,} pairs, written by {card['tool']}. T-CoTs by {card['served']['model']}; the answer "
            f"was told for a share of {card['settings']['gold_share']:g} of the queries with a text target.",
            "",
            "| data source | pairs | T-CoTs | failed sides | gold told | reply tokens |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Refused replies, by rule:",
            "",
            *refused,
            "",
            f"Licence: {card['licence']}.",
            "",
        ]
    )
