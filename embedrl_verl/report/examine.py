# SPDX-License-Identifier: Apache-2.0
"""From pair records to cards: decode the media, read the T-CoTs, say what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from embedrl_verl.data.media import LoadedItem, load_item, resolve_media_path
from embedrl_verl.data.schema import SIDES, Item, Side, input_kind
from embedrl_verl.data.table import LocatedPair, Problem
from embedrl_verl.errors import MediaError
from embedrl_verl.kinds import InputKind
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.lengths import LengthMeter, Lengths
from embedrl_verl.report.rows import NO_SOURCE
from embedrl_verl.report.views import CardView, Flag, SideView

MAX_NEGATIVES = 16


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
        record, lengths, flags = found.record, Lengths(), list[Flag]()
        try:
            lengths = self.meter.measure(found, media_root) if self.meter else lengths
        except MediaError as error:
            flags.append(Flag("media", f"{error}."))
        sides = [
            self._with_lengths(
                self._side(record.item(side), side.capitalize(), input_kind(record, side), media_root), side, lengths
            )
            for side in SIDES
        ]
        more = [
            self._side(item, f"Negative {number}", input_kind(replace(record, target=item), "target"), media_root)
            for number, item in enumerate(record.negatives[:MAX_NEGATIVES], 1)
        ]
        facts = [("query id", record.query_id), ("target id", record.target_id)]
        if self.verdicts is not None:
            facts.append(("relevance", self.verdicts.get(record.pair_id, "not judged")))
        annotated = [side for side in SIDES if record.item(side).tcot.strip()]
        if len(annotated) == 1:
            flags.append(Flag("no_tcot", f"Only the {annotated[0]} has one; contrastive training needs both."))
        told = tuple((name, value) for name, value in facts if value)
        return CardView(record.pair_id, record.data_source, where, tuple(sides), tuple(more), told, tuple(flags))

    def _side(self, item: Item, title: str, kind: InputKind, media_root: str | None) -> SideView:
        loaded, flags = None, list[Flag]()
        try:
            for frame in item.video.frames if item.video else ():  # not all are drawn, but all must be there
                if isinstance(frame, str):
                    resolve_media_path(frame, media_root)
            loaded = load_item(item, media_root, max_frames=self.max_frames)
        except MediaError as error:
            flags.append(Flag("media", f"{error}."))
        tcots = (self.reader.view(item.tcot, loaded, kind),) if item.tcot.strip() else ()
        note = _media_note(item, loaded)
        return SideView(title, kind, item.text, item.instruction, loaded, tcots, note, flags=tuple(flags))

    def _with_lengths(self, view: SideView, side: Side, lengths: Lengths) -> SideView:
        facts, flags = [], list(view.flags)
        for (name, whose), tokens in lengths.items():
            if whose == side and self.meter is not None:
                limit, told = self.meter.limit(name), "T-CoT" if name == "tcot" else name
                facts.append((f"{told} tokens", f"{tokens:,} of {limit:,}"))
                if tokens > limit:
                    flags.append(
                        Flag("too_long", f"The {told} has {tokens:,} tokens; the recipe's limit is {limit:,}.")
                    )
        return replace(view, facts=tuple(facts), flags=tuple(flags))


def _media_note(item: Item, loaded: LoadedItem | None) -> str:
    """What the stored media are, in a few words."""
    notes = [f"{len(item.images)} images"] if len(item.images) > 1 else []
    if item.video is not None:
        notes.append(item.video.path or f"{len(item.video.frames)} frames")
        if loaded is not None and loaded.times is not None:
            notes.append(f"{len(loaded.frames)} drawn, {loaded.times.fps:g} a second")
    return ", ".join(notes)
