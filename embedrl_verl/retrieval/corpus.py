# SPDX-License-Identifier: Apache-2.0
"""The rows that a folder of vectors was embedded from, by their numbers, as cards with media, boxes and key frames."""

from __future__ import annotations

from itertools import islice

from embedrl_verl.embedder.loading import family_of_config, load_config
from embedrl_verl.errors import DataError
from embedrl_verl.model import Ask
from embedrl_verl.model.loading import read_settings
from embedrl_verl.model.options import PairOptions
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.page import rendered
from embedrl_verl.report.views import CardView, SideView
from embedrl_verl.retrieval.index import Index
from embedrl_verl.retrieval.inputs import ROW_ERRORS, Inputs, Reading, read_part

PICTURE_SIDE = 640
"""Longest side of a shown picture, in pixels."""


class Corpus:
    """See the module. Nothing but these rows can be asked for.

    Raises:
        DataError: the inputs are not where they were, or have changed.
    """

    def __init__(self, index: Index, options: PairOptions, max_frames: int) -> None:
        settings = index.settings
        self._index, self._reader = index, tcot_reader(PairOptions.of(settings), options)
        given = Inputs([one["file"] for one in index.inputs], settings["rows_per_part"])
        if given.facts != index.inputs or given.count != len(index.vectors):
            raise DataError("the inputs have changed since they were embedded; embed them again (embedrl embed)")
        self._parts = given.parts
        self._how = Reading(settings["side"], settings["instruction"], settings["media_root"], max_frames)

    def card(self, row: int) -> str:
        """HTML of a row. Blocks: media are decoded."""
        part, offset = self._index.place(row)
        found = next(islice(read_part(self._parts[part], self._how), offset, None))
        hit = self._index.hit(0.0, row)
        try:
            sides: tuple[SideView, ...] = (side_view("Document", found.ask(), hit.tcot, self._reader),)
        except ROW_ERRORS as error:
            sides = (SideView("Document", None, str(error), "", None),)
        return rendered_card(CardView(hit.id, "", found.where.rpartition("/")[2], sides), row + 1)


def tcot_reader(*options: PairOptions) -> TcotReader | None:
    """Reads the T-CoTs of the Reasoner that the last of these names; None if none does."""
    writers = [(one.prompts_like or one.reasoner, one) for one in options]
    path, named = next(((path, one) for path, one in reversed(writers) if path), (None, None))
    if path is None or named is None:
        return None
    settings = read_settings(named.embedder, named.overrides, named.device)
    return TcotReader.of(settings.asked(path)[0], family_of_config(load_config(path)), settings.evidence(path))


def side_view(title: str, ask: Ask, tcot: str | None, reader: TcotReader | None) -> SideView:
    """What was embedded, with its T-CoT (None: it was embedded alone)."""
    tcots = () if tcot is None or reader is None else (reader.view(tcot, ask.item, ask.kind),)
    return SideView(title, ask.kind, ask.item.text, ask.item.instruction, ask.item, tcots)


def rendered_card(view: CardView, number: int) -> str:
    """HTML of a card, all values escaped."""
    return str(rendered("card", card=view, number=number, max_side=PICTURE_SIDE))
