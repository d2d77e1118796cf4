# SPDX-License-Identifier: Apache-2.0
"""From pair records to encoded rows: what the Embedder reads of a pair, with or without T-CoT and evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch.utils.data import Dataset

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.identity import NO_QUERY, ContentId, content_id, target_content
from embedrl_verl.data.inspection import LocatedPair, locate_pairs
from embedrl_verl.data.media import LoadedItem, fit_image, load_item
from embedrl_verl.data.schema import SIDES, Item
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.embedder import EmbedInput, EmbedProcessor, Encoded
from embedrl_verl.embedder.info_nce import HARD_NEGATIVE, ContrastiveLayout
from embedrl_verl.errors import DataError, EmbedderError, MediaError
from embedrl_verl.families import Family, box_convention, token_side
from embedrl_verl.tcot import cut_evidence, parse_tcot


@dataclass(frozen=True)
class EncodedPair:
    """One pair ready for the model.

    Attributes:
        contents: ids of the pair's contents, and of each hard negative's, which has `NO_QUERY`.
        bare_content: the target's content without regard to its `target_id`, by which a hard negative that is some
            pair's target is found; None = the same as `contents[0].target`.
    """

    index: int
    query: Encoded
    target: Encoded
    negatives: tuple[Encoded, ...]
    contents: tuple[ContentId, ...]
    bare_content: int | None = None


def read_training_pairs(files: Sequence[str], *, tcot: bool) -> list[LocatedPair]:
    """All pairs of the files.

    Args:
        tcot: every side must have a T-CoT.

    Raises:
        DataError: a malformed row, a double id, a side without T-CoT, or no pair at all; the first five are named.
    """
    pairs, problems = locate_pairs(files)
    messages = [problem.message for problem in problems]
    if tcot:
        messages += [
            f"{pair}: {side}.tcot is empty; annotate the record, or train on the input alone (data.tcot=False)"
            for pair in pairs
            for side in SIDES
            if not pair.record.item(side).tcot.strip()
        ]
        # Negatives without T-CoT would be told apart by that alone.
        messages += [
            f"{pair}: negatives[{i}].tcot is empty; annotate it, or leave the negative out"
            for pair in pairs
            for i, item in enumerate(pair.record.negatives)
            if not item.tcot.strip()
        ]
    if messages:
        raise DataError(f"{len(messages)} problem(s) in the training data:\n" + "\n".join(messages[:5]))
    if not pairs:
        raise DataError(f"no pair records in {', '.join(files)}")
    return pairs


def video_sources(pairs: Iterable[LocatedPair]) -> set[str]:
    """Sources with a video on either side of a pair."""
    return {p.record.data_source for p in pairs if p.record.query.video or p.record.target.video}


class PairRows(Dataset[EncodedPair]):
    """Encodes pairs. An index is (number of the pair, raw): raw pairs are read without T-CoT and evidence."""

    def __init__(
        self,
        pairs: Sequence[LocatedPair],
        processor: EmbedProcessor,
        *,
        media: DataSettings,
        evidence: EvidenceConfig,
        media_root: str | None,
        tcot: bool,
        negatives: bool = True,
    ) -> None:
        self._pairs, self._processor = pairs, processor
        self._negatives = negatives and any(pair.record.negatives for pair in pairs)
        self._evidence, self._media_root, self._tcot = evidence, media_root, tcot
        self._max_frames = media.max_frames
        family = next(name for name in get_args(Family) if name == media.family)
        self._family: Family = family
        self._writer_limits = media.limits(token_side(family))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: tuple[int, bool]) -> EncodedPair:
        """Decode and encode one pair.

        Raises:
            MediaError, EmbedderError: with file, row and side of the pair.
        """
        index, raw = key
        pair = self._pairs[index]
        record = pair.record
        tcot = self._tcot and not raw
        query = self._encode(pair, "query", record.item("query"), tcot)
        target = self._encode(pair, "target", record.target, tcot)
        try:
            contents = [content_id(record, self._media_root)]
            if not self._negatives:
                return EncodedPair(index, query, target, (), tuple(contents))
            contents += [ContentId(NO_QUERY, target_content(item, self._media_root)) for item in record.negatives]
            bare = target_content(record.target, self._media_root)
        except MediaError as error:
            raise MediaError(f"{pair}: {error}") from error
        negatives = tuple(self._encode(pair, f"negatives[{i}]", item, tcot) for i, item in enumerate(record.negatives))
        return EncodedPair(index, query, target, negatives, tuple(contents), bare)

    def source(self, index: int) -> str:
        """Data source of a pair."""
        return self._pairs[index].record.data_source

    def embed_input(self, item: Item, *, tcot: bool) -> EmbedInput:
        """What the Embedder reads of an item."""
        loaded = load_item(item, self._media_root, max_frames=self._max_frames)
        if not tcot or not item.tcot.strip():
            return EmbedInput(loaded)
        parsed = parse_tcot(item.tcot, num_frames=len(loaded.frames) or None, num_images=len(loaded.images) or None)
        evidence = cut_evidence(
            parsed,
            images=loaded.images,
            frames=loaded.frames,
            family=self._family,
            resized_sizes=self._seen_sizes(loaded),
            min_side=self._evidence.min_side,
            max_aspect=self._evidence.max_aspect,
            max_evidence=self._evidence.max_items,
        )
        return EmbedInput(loaded, parsed, evidence.images)

    def _seen_sizes(self, loaded: LoadedItem) -> list[tuple[int, int]] | None:
        """Sizes of the images as the writer of the T-CoT saw them; only absolute boxes need them."""
        if box_convention(self._family) != "absolute":
            return None
        return [fit_image(image, self._writer_limits).size for image in loaded.images]

    def _encode(self, pair: LocatedPair, side: str, item: Item, tcot: bool) -> Encoded:
        try:
            return self._processor.encode(self.embed_input(item, tcot=tcot))
        except (MediaError, EmbedderError) as error:
            raise type(error)(f"{pair}, {side}: {error}") from error


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one or all ranks: queries first, then targets, then hard negatives.

    Attributes:
        rows: what to embed, in that order.
        layout: pairs are numbered by their place in the batch, so that a pair drawn twice is two pairs of one query and
            one target.
        bare: int64 (T,), `bare_content` of the targets, content of the hard negatives.
    """

    rows: list[Encoded]
    layout: ContrastiveLayout
    bare: torch.Tensor


def rows_of_pairs(pairs: Sequence[EncodedPair], places: Sequence[int]) -> Rows:
    """The rows of some pairs, `places` their places in the whole batch."""
    negatives = [
        (one, content) for pair in pairs for one, content in zip(pair.negatives, pair.contents[1:], strict=True)
    ]
    number, content = torch.tensor(places), torch.tensor([pair.contents[0] for pair in pairs])
    layout = ContrastiveLayout(
        query_pair=number,
        target_pair=torch.cat([number, torch.full((len(negatives),), HARD_NEGATIVE)]),
        query_content=content,
        target_content=torch.cat([content, torch.tensor([c for _, c in negatives], dtype=torch.int64).reshape(-1, 2)]),
    )
    encoded = [pair.query for pair in pairs] + [pair.target for pair in pairs] + [one for one, _ in negatives]
    bare = [pair.contents[0].target if pair.bare_content is None else pair.bare_content for pair in pairs]
    return Rows(encoded, layout, torch.tensor(bare + [c.target for _, c in negatives], dtype=torch.int64))


def unmask_ids(layout: ContrastiveLayout, bare: torch.Tensor) -> ContrastiveLayout:
    """The layout of all ranks in which targets and hard negatives that are one content have one id.

    Targets with a `target_id` have ids of their own kind, which no content ever equals; without this, another pair's
    answer that was mined as a hard negative would be a negative of that pair too.
    """
    query, target = layout.query_content.clone(), layout.target_content.clone()
    own = layout.target_pair >= 0
    one: dict[int, int] = {}  # id of each bare content
    for shown, stated in zip(bare[own].tolist(), layout.target_content[own, 1].tolist(), strict=True):
        kept = one.setdefault(shown, stated)
        if kept != stated:  # two ids over one content
            one.update({content: kept for content, name in one.items() if name == stated})
            for ids in (query, target):
                ids[:, 1].masked_fill_(ids[:, 1] == stated, kept)
    for place in (~own).nonzero().flatten().tolist():
        target[place, 1] = one.get(int(bare[place]), int(target[place, 1]))
    return ContrastiveLayout(layout.query_pair, layout.target_pair, query, target)


def describe_pairs(pairs: Iterable[LocatedPair]) -> dict[str, int]:
    """Pairs of each source."""
    return dict(sorted(Counter(pair.record.data_source for pair in pairs).items()))
