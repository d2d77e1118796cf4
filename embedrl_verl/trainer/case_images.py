# SPDX-License-Identifier: Apache-2.0
"""Pictures of validation cases for Weights & Biases and TensorBoard: what the Reasoner points at, validation after
validation (`embedrl.validation.case_images`).

verl's own logger takes texts alone, so they go straight to the same W&B run and the same TensorBoard folder.
"""

from __future__ import annotations

import logging
import os
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.media import LoadedItem, load_item
from embedrl_verl.data.schema import SIDES, input_kind
from embedrl_verl.errors import MediaError
from embedrl_verl.report.evidence import TcotReader
from embedrl_verl.report.views import TcotView

if TYPE_CHECKING:
    from embedrl_verl.data.dataset import TCoTDataset
    from embedrl_verl.trainer.reward_stage import Row

logger = logging.getLogger(__name__)
HEIGHT = 320
"""Pixels of a picture or frame; boxes are drawn in it."""
COLORS = ("#c05621", "#2b6cb0", "#38805a", "#805ad5", "#b83280")
KEY_FRAME = "#c05621"
TAG = "embedrl/cases"


class Case(NamedTuple):
    """A drawn case and its name: data source, pair, side."""

    name: str
    image: Image.Image


class CaseImages:
    """The same sides with media in every validation, spread over the data sources.

    Args:
        count: sides; 0 = none.
        dataset: of the validation.
        evidence: what may be cut; a box that is not cut is drawn thin.
        loggers: `trainer.logger`.
        where: `trainer.project_name` and `trainer.experiment_name`, which name TensorBoard's default folder.
    """

    def __init__(
        self, count: int, dataset: TCoTDataset, evidence: EvidenceConfig, loggers: Sequence[str], where: tuple[str, str]
    ) -> None:
        self._dataset, self._where = dataset, where
        self._loggers = [name for name in ("wandb", "tensorboard") if name in loggers] if count else []
        if count and not self._loggers:
            logger.warning(
                "EG-RL: embedrl.validation.case_images=%d draws for wandb and tensorboard; trainer.logger has neither",
                count,
            )
        self._reader = TcotReader.of(dataset.settings, dataset.family, evidence)
        self._places = dict(self._chosen(count)) if self._loggers else {}
        self._texts: dict[tuple[str, str], str] = {}

    def _chosen(self, count: int) -> Iterator[tuple[tuple[str, str], int]]:
        """(pair id, side) -> place in the data set: of each source in turn."""
        by_source: dict[str, list[int]] = defaultdict(list)
        for pair, source in enumerate(self._dataset.pair_sources):
            by_source[source].append(pair)
        turns = (
            pairs[i] for i in range(max(map(len, by_source.values()))) for pairs in by_source.values() if i < len(pairs)
        )
        for pair in turns:
            record = self._dataset.record(pair)
            for number, side in enumerate(SIDES):
                item = record.item(side)
                if count and (item.images or item.video):
                    count -= 1
                    yield (record.pair_id, side), 2 * pair + number
            if not count:
                return

    def note(self, rows: Iterable[Row]) -> None:
        """Keep the first rollout of each chosen side."""
        for row in rows:
            key = (row.pair_id, SIDES[row.side])
            if row.session == 0 and key in self._places:
                self._texts[key] = row.tcot.text

    def log(self, step: int) -> None:
        """Draw what was noted, and hand it to the loggers."""
        texts, self._texts = self._texts, {}
        cases = [case for key, place in self._places.items() if key in texts for case in self._drawn(place, texts[key])]
        if not cases:
            return
        if "wandb" in self._loggers:
            import wandb

            wandb.log({TAG: [wandb.Image(case.image, caption=case.name) for case in cases]}, step=step)
        if "tensorboard" in self._loggers:
            from torch.utils.tensorboard import SummaryWriter

            # verl's default, and its variable.
            folder = os.environ.get("TENSORBOARD_DIR", "tensorboard_log/{}/{}".format(*self._where))
            with SummaryWriter(folder) as writer:
                for case in cases:
                    writer.add_image(f"{TAG}/{case.name}", np.asarray(case.image), step, dataformats="HWC")

    def _drawn(self, place: int, text: str) -> Iterator[Case]:
        record, side = self._dataset.record(place // 2), SIDES[place % 2]
        name = f"{record.data_source}/{record.pair_id}/{side}"
        try:
            item = load_item(record.item(side), self._dataset.media_root, max_frames=self._dataset.settings.max_frames)
        except MediaError as error:  # gone since the run began
            logger.warning("EG-RL: case %s is not drawn: %s", name, error)
            return
        yield Case(name, draw_case(item, self._reader.view(text, item, input_kind(record, side))))


def draw_case(item: LoadedItem, view: TcotView) -> Image.Image:
    """The input's images with the boxes of its T-CoT, its frames with the key frames framed, and the texts: RGB."""
    tiles = []
    for number, image in enumerate(item.images, 1):
        tile, scale = _tile(image)
        pen = ImageDraw.Draw(tile)
        for box in view.boxes:
            if box.image == number and box.pixels:
                corners = [round(edge * scale) for edge in box.pixels]
                pen.rectangle(corners, outline=COLORS[box.colour % len(COLORS)], width=1 if box.status else 3)
        tiles.append(tile)
    for number, frame in enumerate(item.frames, 1):
        tile, _ = _tile(frame)
        if number in view.tcot.key_frames:
            ImageDraw.Draw(tile).rectangle((0, 0, tile.width - 1, tile.height - 1), outline=KEY_FRAME, width=5)
        tiles.append(tile)
    width = max(640, sum(tile.width + 8 for tile in tiles))
    said = [line for line in (item.instruction, item.text, view.tcot.text) if line]
    lines = [part for line in said for part in textwrap.wrap(line, width // 7) or [""]]
    font = ImageFont.load_default(size=13)
    whole = Image.new("RGB", (width, HEIGHT + 17 * len(lines) + 12), "white")
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, 0))
        left += tile.width + 8
    ImageDraw.Draw(whole).multiline_text((4, HEIGHT + 6), "\n".join(lines), fill="black", font=font, spacing=4)
    return whole


def _tile(image: Image.Image) -> tuple[Image.Image, float]:
    """The image at `HEIGHT`, and by how much it was scaled."""
    scale = HEIGHT / image.height
    return image.convert("RGB").resize((max(1, round(image.width * scale)), HEIGHT)), scale
