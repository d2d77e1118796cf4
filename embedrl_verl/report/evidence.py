# SPDX-License-Identifier: Apache-2.0
"""A T-CoT with its input, as a view: where its boxes lie, what is cut, what is wrong. For files and for RL rollouts."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from typing_extensions import Self

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.media import LoadedItem, MediaLimits, smart_resize
from embedrl_verl.errors import MediaError
from embedrl_verl.families import BOX_UNITS, FACTS, BoxConvention, Family, box_convention, token_side
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND, InputKind
from embedrl_verl.report.text import is_in_text
from embedrl_verl.report.views import BoxView, Facts, Flag, PieceView, TcotView
from embedrl_verl.tcot import Evidence, TCoT, boxes_to_pixels, cut_evidence, parse_tcot

WHOLE = 0.95
"""Share of the image from which a box points at nothing in particular."""
FAMILY_OF_UNITS = {facts.boxes: family for family, facts in FACTS.items()}
Size = tuple[int, int]


@dataclass(frozen=True)
class TcotReader:
    """Makes views of T-CoTs. `convention`: units of the boxes; `limits`: sizes at which the Reasoner saw images, which
    absolute boxes refer to, and at which the Embedder reads pieces; `evidence`: what may be cut."""

    convention: BoxConvention
    limits: MediaLimits
    evidence: EvidenceConfig = EvidenceConfig()  # noqa: RUF009 - immutable

    @classmethod
    def of(cls, media: MediaConfig, family: Family, evidence: EvidenceConfig) -> Self:
        """Of a Reasoner of a family that was asked by `media`."""
        limits = MediaLimits.of(media, token_side(family), media.max_frames)
        return cls(box_convention(family), limits, evidence)

    def view(
        self,
        text: str,
        item: LoadedItem | None,
        kind: InputKind | None,
        *,
        title: str = "T-CoT",
        prefix: str = "",
        facts: Facts = (),
    ) -> TcotView:
        """A T-CoT as the Reasoner wrote it. Without `item` (what it was written about) only its form is looked at;
        without `kind` any evidence will do; `prefix` tells the boxes and key frames of several T-CoTs apart."""
        sizes = (None, None) if item is None else (len(item.frames) or None, len(item.images) or None)
        tcot = parse_tcot(text, num_frames=sizes[0], num_images=sizes[1])
        flags = [] if tcot.is_well_formed else [Flag("form", "; ".join(tcot.problems) + ".")]
        called_for = EVIDENCE_KEY_OF_KIND.values() if kind is None else [EVIDENCE_KEY_OF_KIND[kind]]
        if not any(map(tcot.has_evidence, called_for)):
            flags.append(Flag("no_evidence", f"This kind of input calls for {' or '.join(dict.fromkeys(called_for))}."))
        bare = TcotView(title, tcot, facts=facts, flags=tuple(flags), prefix=prefix)
        if item is None:
            return bare
        words = f"{item.instruction}\n{item.text}"
        missing = tuple(word for word in dict.fromkeys(tcot.text_keywords) if not is_in_text(word, words))
        if missing:
            quoted = ", ".join(f"“{word}”" for word in missing[:8])
            flags.append(Flag("keyword", f"{len(missing)} not in the text: {quoted}."))
        try:
            seen = [self._read_at(image.size) for image in item.images]
            boxes, box_flags = self._boxes(tcot, item, seen, prefix)
            places, pieces = self._pieces(tcot, item, seen, boxes, prefix)
        except MediaError as error:  # sides that no model reads
            return replace(bare, flags=(*flags, Flag("media", f"{error}.")), missing_keywords=missing)
        flags += box_flags
        if places > len(pieces):
            flags.append(Flag("too_much", f"It points at {places} places; {len(pieces)} are cut."))
        return TcotView(title, tcot, boxes, pieces, missing, facts, tuple(flags), prefix)

    def _read_at(self, size: Size) -> Size:
        low, high = self.limits.tokens(is_frame=False)
        return smart_resize(*size[::-1], token_side=self.limits.token_side, min_tokens=low, max_tokens=high)[::-1]

    def _boxes(
        self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size], prefix: str
    ) -> tuple[tuple[BoxView, ...], list[Flag]]:
        """The boxes, and what is wrong with some of them."""
        views, units = list[BoxView](), BOX_UNITS[self.convention]
        found: dict[str, list[str]] = defaultdict(list)
        said = {
            "units": f"outside the image; boxes are read as {units.words} (--boxes)",
            "whole_image": f"{WHOLE:.0%} of the image or more",
        }
        for number, box in enumerate(tcot.boxes, 1):
            name, written, pixels = f"{prefix}{number}", (box.x1, box.y1, box.x2, box.y2), None
            status = "; ".join(self._cut(replace(tcot, evidence={"bbox_2d": (box,)}), item, seen).problems)
            if box.image <= len(item.images):
                (width, height), read_at = item.images[box.image - 1].size, seen[box.image - 1]
                sizes = {"width": width, "height": height, "resized_width": read_at[0], "resized_height": read_at[1]}
                pixels = next(iter(boxes_to_pixels([box], convention=self.convention, **sizes)), None)
                if min(written) < 0 or any(map(operator.gt, written, units.of(read_at) * 2)):
                    found["units"].append(name)
                if pixels and (pixels[2] - pixels[0]) * (pixels[3] - pixels[1]) >= WHOLE * width * height:
                    found["whole_image"].append(name)
            if status:
                code = "tiny_box" if pixels else "lost_box"
                found[code].append(name)
                said.setdefault(code, status)
            views.append(BoxView(name, number - 1, written, box.image, pixels, status))
        listed = {
            code: ", ".join(names[:8]) + (" and others" if len(names) > 8 else "") for code, names in found.items()
        }
        return tuple(views), [Flag(code, f"Box {names}: {said[code]}.") for code, names in listed.items()]

    def _cut(self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size]) -> Evidence:
        return cut_evidence(
            tcot,
            images=item.images,
            frames=item.frames,
            family=FAMILY_OF_UNITS[self.convention],
            resized_sizes=seen,
            min_side=self.evidence.min_side,
            max_aspect=self.evidence.max_aspect,
            max_evidence=self.evidence.max_items,
        )

    def _pieces(
        self, tcot: TCoT, item: LoadedItem, seen: Sequence[Size], boxes: Sequence[BoxView], prefix: str
    ) -> tuple[int, tuple[PieceView, ...]]:
        """How many places can be cut, and the pieces that the Embedder gets, in its order."""
        names: dict[object, tuple[str, int | None]] = {}
        for box in boxes:
            if not box.status:
                names.setdefault((box.image, box.pixels), (box.name, box.colour))
        for frame in tcot.key_frames:
            if frame <= len(item.frames):
                names.setdefault(frame, (f"frame {prefix}{frame}", None))
        images = self._cut(tcot, item, seen).images  # the first of them
        more = [(f"piece {prefix}{number}", None) for number in range(len(names) + 1, len(images) + 1)]  # other kinds'
        cut = zip([*names.values(), *more], images, strict=False)
        pieces = tuple(PieceView(*name, image, self._read_at(image.size)) for name, image in cut)
        return max(len(names), len(pieces)), pieces
