# SPDX-License-Identifier: Apache-2.0
"""From pair records to rows: what the Embedder reads of a pair, with or without T-CoT and evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.identity import NO_QUERY, content_id, target_content
from embedrl_verl.data.media import MediaLimits, fit_image, load_item
from embedrl_verl.data.schema import SIDES, Item, PairRecord
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.embedder import EmbedInput, EmbedProcessor, Encoded
from embedrl_verl.embedder.info_nce import HARD_NEGATIVE, ContrastiveLayout
from embedrl_verl.errors import DataError, EmbedderError, MediaError
from embedrl_verl.families import BOX_UNITS, box_convention, family_of, token_side

Contents = tuple[int, ...]
"""Ids of what a pair is of; pairs that share one, in the same place, are no negatives of each other. A `ContentId`, and
where the data has hard negatives a third one, the target's own content: a mined target is known by that alone."""


class EncodedPair(NamedTuple):
    """One pair ready for the model. `contents` are the pair's, then those of each hard negative."""

    query: Encoded
    target: Encoded
    negatives: tuple[Encoded, ...]
    contents: tuple[Contents, ...]


def items_of(record: PairRecord) -> dict[str, Item]:
    """Everything that is embedded of a pair: `query`, `target`, `negatives[0]`, ..."""
    items = {"query": record.item("query"), "target": record.target}
    return items | {f"negatives[{i}]": item for i, item in enumerate(record.negatives)}


def read_training_pairs(files: Sequence[str], *, tcot: bool) -> PairTable:
    """All pairs of the files, of which every row is one.

    Args:
        tcot: every side, and every hard negative (it would be told apart by that alone), must have a T-CoT.
    """
    pairs = PairTable(files)
    messages = [problem.message for problem in pairs.problems().values()]
    if tcot and not messages:
        messages += [
            f"{pair}: {name}.tcot is empty; annotate it (a hard negative may be left out instead), or train on the "
            "input alone (data.tcot=False)"
            for pair in pairs.rows(_without_tcot(pairs))
            if isinstance(pair, LocatedPair)
            for name, item in items_of(pair.record).items()
            if not item.tcot.strip()
        ]
    if messages:
        raise DataError(f"{len(messages)} problem(s) in the training data:\n" + "\n".join(messages[:5]))
    if not len(pairs):
        raise DataError(f"no pair records in {', '.join(files)}")
    return pairs


def _without_tcot(pairs: PairTable) -> list[int]:
    """Rows that lack the T-CoT of a side, and those with hard negatives, which are looked at one by one."""
    negatives = pairs.column("negatives")
    found = pc.fill_null(pc.greater(pc.list_value_length(negatives), 0), False)
    for side in SIDES:
        written = pc.utf8_trim_whitespace(pc.struct_field(pairs.column(side), "tcot"))
        found = pc.or_(found, pc.fill_null(pc.equal(pc.utf8_length(written), 0), True))
    rows: list[int] = np.flatnonzero(found.to_numpy()).tolist()
    return rows


def count_by_source(pairs: PairTable) -> dict[str, int]:
    """Pairs of each source, by name."""
    return dict(sorted(Counter(pairs.column("data_source").to_pylist()).items()))


class PairRows(Dataset[EncodedPair]):
    """Encodes pairs. An index is (number of the pair, raw): raw pairs are read without T-CoT and evidence.

    Args:
        media: frames of a video, and the family and image limits of the model that wrote the T-CoTs.
        tcot: read T-CoTs and evidence at all.
        negatives: encode the hard negatives too.
    """

    def __init__(
        self,
        pairs: PairTable,
        processor: EmbedProcessor,
        *,
        media: MediaConfig,
        evidence: EvidenceConfig,
        media_root: str | None,
        tcot: bool,
        negatives: bool = True,
    ) -> None:
        self._pairs, self._processor = pairs, processor
        self._negatives = negatives and bool(pc.sum(pc.list_value_length(pairs.column("negatives"))).as_py())
        self._media, self._evidence, self._media_root, self._tcot = media, evidence, media_root, tcot
        self._family = family_of(media.family)
        self._contents: dict[int, tuple[Contents, ...]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: tuple[int, bool]) -> EncodedPair:
        """Decode and encode one pair; MediaError and EmbedderError name file, row and side."""
        index, raw = key
        pair, rows = self._pairs[index], []
        assert isinstance(pair, LocatedPair)
        items = list(items_of(pair.record).items())
        for name, item in items if self._negatives else items[:2]:
            try:
                rows.append(self._processor.encode(self._embed_input(item, tcot=self._tcot and not raw)))
            except (MediaError, EmbedderError) as error:
                raise type(error)(f"{pair}, {name}: {error}") from error
        if index not in self._contents:  # every medium is hashed, so once a pair (in each loader process)
            self._contents[index] = self._contents_of(pair.record)
        return EncodedPair(rows[0], rows[1], tuple(rows[2:]), self._contents[index])

    def source(self, index: int) -> str:
        """Data source of a pair."""
        return str(self._pairs.column("data_source")[index])

    def _contents_of(self, record: PairRecord) -> tuple[Contents, ...]:
        own = content_id(record, self._media_root)
        if not self._negatives:
            return (own,)
        shown = target_content(record.target, self._media_root) if record.target_id else own.target
        mined = [target_content(item, self._media_root) for item in record.negatives]
        return ((*own, shown), *((NO_QUERY, one, one) for one in mined))

    def _embed_input(self, item: Item, *, tcot: bool) -> EmbedInput:
        loaded = load_item(item, self._media_root, max_frames=self._media.max_frames)
        if not tcot or not item.tcot.strip():
            return EmbedInput(loaded)
        seen = None  # sizes of the images as the writer of the T-CoT saw them
        if BOX_UNITS[box_convention(self._family)].side is None:
            limits = MediaLimits.of(self._media, token_side(self._family), self._media.max_frames)
            seen = [fit_image(image, limits).size for image in loaded.images]
        return EmbedInput.with_tcot(loaded, item.tcot, self._family, self._evidence, seen)


class Rows(NamedTuple):
    """What one rank embeds, queries first, then targets, then hard negatives, and which of them belong together.

    Pairs are numbered by their place in the batch, so that a pair drawn twice is two pairs of one query and one target.
    """

    rows: list[Encoded]
    layout: ContrastiveLayout


def rows_of_pairs(pairs: Sequence[EncodedPair], places: Sequence[int]) -> Rows:
    """The rows of some pairs, `places` their places in the whole batch."""
    negatives = [row for pair in pairs for row in pair.negatives]
    number, content = torch.tensor(places), torch.tensor([pair.contents[0] for pair in pairs])
    mined = [ids for pair in pairs for ids in pair.contents[1:]]
    layout = ContrastiveLayout(
        query_pair=number,
        target_pair=torch.cat([number, torch.full((len(negatives),), HARD_NEGATIVE)]),
        query_content=content,
        target_content=torch.cat([content, torch.tensor(mined, dtype=torch.int64).reshape(-1, content.shape[1])]),
    )
    return Rows([pair.query for pair in pairs] + [pair.target for pair in pairs] + negatives, layout)
