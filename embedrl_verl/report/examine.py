# SPDX-License-Identifier: Apache-2.0
"""From rows of pair records to cards: decode the media, read the T-CoTs, say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embedrl_verl.data.media import LoadedItem, load_item, resolve_media_path
from embedrl_verl.data.schema import SIDES, Item, PairRecord, input_kind
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.kinds import InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.lengths import LengthMeter, Lengths, Measure, limit_of, overlong
from embedrl_verl.report.rows import NO_SOURCE, Row
from embedrl_verl.report.views import CardView, Flag, SideView, TcotView

MEASURE_NAMES: Mapping[Measure, str] = {"prompt": "prompt", "tcot": "T-CoT", "text": "text"}
MAX_NEGATIVES = 16


@dataclass(frozen=True)
class Examiner:
    """Makes cards.

    Attributes:
        reader: reads T-CoTs and cuts evidence.
        max_frames: frames drawn from a video.
        meter: counts tokens; None: nothing is said about lengths.
        verdicts: of the relevance judge, by pair id; None: nothing is said about them.
    """

    reader: TcotReader
    max_frames: int
    meter: LengthMeter | None = None
    verdicts: Mapping[str, str] | None = None

    def card(self, row: Row) -> CardView:
        """The card of a row; whatever is wrong with the row stands on it."""
        where = f"{row.file.name}, row {row.row}"
        if isinstance(row.found, DataError):
            return CardView(where, NO_SOURCE, str(row.file), flags=(Flag("unreadable", str(row.found)),))
        record = row.found
        flags: list[Flag] = []
        lengths: Lengths = {}
        sides = {
            side: self._side(record.item(side), side.capitalize(), input_kind(record, side), row) for side in SIDES
        }
        if self.meter is not None and not any(side.flags for side in sides.values()):
            try:
                lengths = self.meter.measure(record, row)
            except MediaError as error:  # of a negative
                flags.append(Flag("media", str(error)))
        annotated = [name for name in SIDES if record.item(name).tcot.strip()]
        if len(annotated) == 1:
            flags.append(Flag("no_tcot", f"Only the {annotated[0]} has one; contrastive training needs both."))
        return CardView(
            title=record.pair_id,
            source=record.data_source,
            where=where,
            sides=tuple(self._with_lengths(view, lengths.get(side, {})) for side, view in sides.items()),
            more=self._negatives(record, row),
            facts=self._facts(record),
            flags=tuple(flags),
        )

    def _facts(self, record: PairRecord) -> tuple[tuple[str, str], ...]:
        ids = (("query id", record.query_id), ("target id", record.target_id))
        facts = tuple(fact for fact in ids if fact[1])
        if self.verdicts is None:
            return facts
        return (*facts, ("relevance", self.verdicts.get(record.pair_id, "not judged")))

    def _negatives(self, record: PairRecord, row: Row) -> tuple[SideView, ...]:
        kind: InputKind | None
        views = []
        for number, item in enumerate(record.negatives[:MAX_NEGATIVES], 1):
            kind = "target_video" if item.video else "target_text"
            if item.images and not item.video:
                kind = "target_page" if item.kind == "page" else "target_image"
            views.append(self._side(item, f"Negative {number}", kind, row))
        return tuple(views)

    def _side(self, item: Item, title: str, kind: InputKind | None, row: Row) -> SideView:
        try:
            for path in _unread_paths(item):
                resolve_media_path(path, row.media_root)
            loaded = load_item(item, row.media_root, max_frames=self.max_frames)
        except MediaError as error:
            flags = (Flag("media", f"{error}."),)
            tcots = self._tcots(item, None, kind)
            return SideView(title, kind, item.text, item.instruction, None, tcots, _stored(item), flags=flags)
        note = _stored(item, loaded)
        return SideView(title, kind, item.text, item.instruction, loaded, self._tcots(item, loaded, kind), note)

    def _tcots(self, item: Item, loaded: LoadedItem | None, kind: InputKind | None) -> tuple[TcotView, ...]:
        return (self.reader.view(item.tcot, loaded, kind),) if item.tcot.strip() else ()

    def _with_lengths(self, side: SideView, lengths: Mapping[Measure, int]) -> SideView:
        if self.meter is None or not lengths:
            return side
        limits = self.meter.limits
        facts = tuple(
            (f"{MEASURE_NAMES[name]} tokens", f"{tokens:,} of {limit_of(name, limits):,}")
            for name, tokens in lengths.items()
        )
        flags = tuple(
            Flag("too_long", f"The {MEASURE_NAMES[name]} has {tokens:,} tokens; the recipe's limit is {limit:,}.")
            for name, tokens, limit in overlong(lengths, limits)
        )
        return SideView(
            side.title,
            side.kind,
            side.text,
            side.instruction,
            side.item,
            side.tcots,
            side.media_note,
            facts,
            (*side.flags, *flags),
        )


def _unread_paths(item: Item) -> Sequence[str]:
    """Paths of frames; not all of them are drawn, but all must be there."""
    return [frame for frame in item.video.frames if isinstance(frame, str)] if item.video is not None else []


def _stored(item: Item, loaded: LoadedItem | None = None) -> str:
    """What the stored media are, in a few words."""
    notes = []
    if len(item.images) > 1:
        notes.append(f"{len(item.images)} {'pages' if item.kind == 'page' else 'images'}")
    if item.video is not None:
        drawn = 0 if loaded is None else len(loaded.frames)
        if item.video.path is not None:
            notes.append(f"{drawn} frames of {item.video.path}" if drawn else item.video.path)
        else:
            stored = len(item.video.frames)
            notes.append(f"{stored} frames" if drawn in (0, stored) else f"{drawn} of {stored} frames")
        if loaded is not None and loaded.times:
            notes.append(f"{loaded.times.fps:g} a second")
    return ", ".join(notes)
