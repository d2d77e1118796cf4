# SPDX-License-Identifier: Apache-2.0
"""`embedrl data show`: a static HTML page of records, with everything that can be seen to be wrong. It is written even
if every record is broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from tqdm import tqdm

from embedrl_verl.annotate.verdict_file import verdict_files_of, verdicts_of
from embedrl_verl.data.files import write_atomically
from embedrl_verl.data.media import LoadedItem, MediaLimits, load_item, resolve_media_path
from embedrl_verl.data.schema import SIDES, Item, Side, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable, Problem
from embedrl_verl.data.threads import default_threads, in_threads
from embedrl_verl.errors import ConfigError, MediaError
from embedrl_verl.families import BOX_UNITS, BoxConvention, box_convention, family_of, token_side
from embedrl_verl.kinds import InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.lengths import LengthMeter, RecipeLimits
from embedrl_verl.report.page import GENERATOR, PageHead, render_page
from embedrl_verl.report.rows import NO_SOURCE, choose, rows_by_source, rows_with_ids
from embedrl_verl.report.views import CardView, Facts, Flag, SideView

NAMED = 5
MAX_NEGATIVES = 16


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
    page = page_to_write(out or f"{Path(files[0]).resolve().stem}.html")
    table = PairTable(files, limits.media_root)
    chosen = rows_with_ids(table, pair_id) if pair_id else choose(table, scan if only else limit, seed)
    drawn = "evenly spaced in each source" if seed is None else f"random in each source, seed {seed}"
    how = "by pair id" if pair_id else "all" if len(chosen) == len(table) else drawn
    meter = None if tokenizer is None else LengthMeter.from_pretrained(tokenizer, limits)
    named = default_family if limits.data.family == "auto" else limits.data.family
    family = family_of(named) if meter is None else meter.prompts.family
    convention, frames = boxes or box_convention(family), limits.data.max_frames
    reader = TcotReader(convention, MediaLimits.of(limits.data, token_side(family), frames), limits.evidence)
    verdict_files = [Path(verdicts)] if verdicts else verdict_files_of(table.files)
    ids = set(table.column("pair_id").take(chosen).to_pylist()) - {None}
    found = verdicts_of(verdict_files, ids) if verdict_files else None
    examiner = Examiner(reader, frames, meter, found)

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
    write_page(page, head, cards(chosen, "reading records"), len(table), max_mib=max_mib, max_side=picture_side)


def page_to_write(out: str) -> Path:
    """The path; ConfigError if something is there that is no page of ours."""
    page = Path(out)
    if page.exists() and not (page.is_file() and GENERATOR.encode() in page.read_bytes()[:4096]):
        raise ConfigError(f"{page} exists and is not a page of `embedrl`; name another file with --out")
    return page


def write_page(
    page: Path, head: PageHead, cards: Iterable[CardView], total: int, *, max_mib: float, max_side: int
) -> None:
    """Write a page and print what is on it, of `total` records."""
    rendered = render_page(head, cards, max_mib=max_mib, max_side=max_side)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, rendered.html)
    except OSError as error:
        raise ConfigError(f"--out {page}: cannot be written ({error})") from error
    size = page.stat().st_size / 1e6
    print(f"{page}: {rendered.cards} of {total} records, {rendered.faults} with a fault, {size:.1f} MB")
    for note in rendered.notes:
        print(note)


def _listed(names: Iterable[str]) -> str:
    several = list(names)
    return ", ".join(several[:NAMED]) + (f" and {len(several) - NAMED} more" if len(several) > NAMED else "")


class Written(NamedTuple):
    """A T-CoT that was written about a side: its text, a title, a prefix that tells its boxes from those of others,
    what else is known of it, and what reads it (None: what reads the others)."""

    text: str
    title: str = "T-CoT"
    prefix: str = ""
    facts: Facts = ()
    reader: TcotReader | None = None


@dataclass(frozen=True)
class Examiner:
    """Makes cards; nothing is said about lengths without a meter, and about verdicts (by pair id) without any."""

    reader: TcotReader
    max_frames: int
    meter: LengthMeter | None = None
    verdicts: Mapping[str, str] | None = None

    def card(self, found: LocatedPair | Problem, media_root: str | None) -> CardView:
        """The card of a row; whatever is wrong with the row stands on it."""
        where = f"{Path(found.file).name}, row {found.row}"
        if isinstance(found, Problem):
            flag = Flag("unreadable", found.message)
            return CardView(where, found.data_source or NO_SOURCE, found.file, flags=(flag,))
        record, flags = found.record, list[Flag]()
        lengths: dict[tuple[str, Side], tuple[int, int]] = {}
        try:
            if self.meter:
                for key, tokens in self.meter.measure(found, media_root).items():
                    lengths[key] = tokens, self.meter.limit(key[0])
        except MediaError as error:
            flags.append(Flag("media", f"{error}."))
        sides = []
        for side in SIDES:
            told = {name: length for (name, whose), length in lengths.items() if whose == side}
            sides.append(self.side(record.item(side), side.capitalize(), input_kind(record, side), media_root, told))
        more = [
            self.side(item, f"Negative {number}", input_kind(replace(record, target=item), "target"), media_root)
            for number, item in enumerate(record.negatives[:MAX_NEGATIVES], 1)
        ]
        verdict = "" if self.verdicts is None else self.verdicts.get(record.pair_id, "not judged")
        facts = (("query id", record.query_id), ("target id", record.target_id), ("relevance", verdict))
        annotated = [side for side in SIDES if record.item(side).tcot.strip()]
        if len(annotated) == 1:
            flags.append(Flag("no_tcot", f"Only the {annotated[0]} has one; contrastive training needs both."))
        shown = tuple((name, value) for name, value in facts if value)
        return CardView(record.pair_id, record.data_source, where, tuple(sides), tuple(more), shown, tuple(flags))

    def side(
        self,
        item: Item,
        title: str,
        kind: InputKind,
        media_root: str | None,
        lengths: Mapping[str, tuple[int, int]] = MappingProxyType({}),
        written: Sequence[Written] | None = None,
    ) -> SideView:
        """A side with what was `written` about it (None: its row's T-CoT); `lengths`: tokens and limit by measure."""
        loaded, facts, flags = None, list[tuple[str, str]](), list[Flag]()
        try:
            for frame in item.video.frames if item.video else ():  # not all are drawn, but all must be there
                if isinstance(frame, str):
                    resolve_media_path(frame, media_root)
            loaded = load_item(item, media_root, max_frames=self.max_frames)
        except MediaError as error:
            flags.append(Flag("media", f"{error}."))
        for measure, (tokens, limit) in lengths.items():
            name = "T-CoT" if measure == "tcot" else measure
            facts.append((f"{name} tokens", f"{tokens:,} of {limit:,}"))
            if tokens > limit:
                flags.append(Flag("too_long", f"The {name} has {tokens:,} tokens; the recipe's limit is {limit:,}."))
        if written is None:
            written = [Written(item.tcot)] if item.tcot.strip() else []
        tcots = []
        for one in written:
            reader = one.reader or self.reader
            tcots.append(reader.view(one.text, loaded, kind, title=one.title, prefix=one.prefix, facts=one.facts))
        note = _media_note(item, loaded)
        return SideView(
            title, kind, item.text, item.instruction, loaded, tuple(tcots), note, tuple(facts), tuple(flags)
        )


def _media_note(item: Item, loaded: LoadedItem | None) -> str:
    """What the stored media are, in a few words."""
    notes = [f"{len(item.images)} images"] if len(item.images) > 1 else []
    if item.video is not None:
        notes.append(item.video.path or f"{len(item.video.frames)} frames")
        if loaded is not None and loaded.times is not None:
            notes.append(f"{len(loaded.frames)} drawn, {loaded.times.fps:g} a second")
    return ", ".join(notes)
