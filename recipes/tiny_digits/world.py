# SPDX-License-Identifier: Apache-2.0
"""The digits world: retrieval pairs over real handwritten digits, with the true T-CoT of each side.

Seven data sources, all about reading a number off a canvas:

| source | query | target |
|---|---|---|
| digits_i2t | picture of five digits | the number as text |
| digits_vqa | picture with two rows + "upper" or "lower" | that row's number |
| digits_t2i | a number | picture of it |
| digits_i2i | picture of five digits | a picture of the same number from other scans |
| digits_video | four frames, two of them with two digits each | the number as text |
| digits_page | page with a printed word and a handwritten number | word and number |
| digits_sheet | a number on a sheet so large that a model sees it as one blurred token | the number as text |

Strips begin at the left edge and lie in one of two middle rows: boxes have the same count of digits everywhere, so that
a model of two layers finds the k-th digit at a fixed distance. Numbers come in families of four that differ in one or
two digits, so that a single misread digit finds the wrong candidate.

Files: `sft.parquet` (cold start), `train.parquet` (contrastive stage and RL), `heldout.parquet` (scans that no stage
trains on). Beside each lies a `.truths.jsonl` with what is known of both sides, which RL never reads.
`train_tcot.parquet` and `heldout_tcot.parquet` are the same pairs with their true T-CoTs, as an annotator leaves them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import typer

from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Side, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.retrieval import Pairs
from embedrl_verl.families import Family, box_convention, token_side
from recipes.tiny_digits.canvas import (
    HELD_OUT_SCANS,
    TRAIN_SCANS,
    Grid,
    ScanBox,
    Strip,
    digit_of_cells,
    draw_canvas,
    png_bytes,
)
from recipes.tiny_digits.settings import TcotParts

FAMILY_SIZE = 4  # numbers that differ in one or two digits
SHEET, SEEN_SMALLER = 32, 4
"""Cells of a sheet in each direction, and how much smaller a model with 64 visual tokens (settings.MEDIA) sees it."""
SHEET_ANSWER = "digits"
WORDS = ("parcel", "ticket", "receipt", "invoice", "locker", "report", "voucher", "permit")


@dataclass(frozen=True)
class Truth:
    """What is known of one side.

    Attributes:
        tcot: the true T-CoT; boxes of families that write pixels are in pixels of the original.
        cells: the digit that each visual token shows, row by row, -1 where there is none; empty without media.
        lesson: the T-CoT that a Reasoner has to write, where it sees the picture smaller and writes boxes in pixels of
            what it sees; "" where that is `tcot`.
    """

    tcot: str
    cells: tuple[int, ...] = ()
    lesson: str = ""


@dataclass(frozen=True)
class Sample:
    """One pair, the truth of each side, and the media root of its paths."""

    record: PairRecord
    query: Truth
    target: Truth
    media_root: str | None = None

    def truth(self, side: Side) -> Truth:
        """What is known of one side."""
        return self.query if side == "query" else self.target


_Side: TypeAlias = tuple[Item, Truth]


def render_tcot(evidence: dict[str, list[int] | list[str]], answer: str) -> str:
    """The compact T-CoT: evidence alone as thinking, a word as check, the number as answer."""
    thinking = json.dumps(evidence, separators=(",", ":"))
    return f"<thinking>{thinking}</thinking><rethink>ok</rethink><answer>{answer}</answer>"


def cut_short(tcot: str) -> str:
    """The T-CoT of a teacher who does not think of retrieval: only the first digit of the number in its answer; where
    the answer has no number, a box around everything (pixels beyond the picture are cut off)."""
    start = tcot.index("<answer>")
    thinking, answer = tcot[:start], tcot[start:]
    if not re.search(r"\d", answer):
        thinking = re.sub(r"\[[\d,]+\]", "[0,0,1000,1000]", thinking)
    return thinking + re.sub(r"(\d)\d+", r"\1", answer)


def parts_of(tcot: str, parts: TcotParts) -> str:
    """The text of a T-CoT that there is in an ablation; DataError if it is a user's and has no answer."""
    if parts != "answer_only":
        return tcot
    if "<answer>" not in tcot:
        raise DataError(f"with answer_only a T-CoT must have an <answer>; got {tcot[:60]!r}")
    return tcot[tcot.index("<answer>") :]


def _text(text: str) -> _Side:
    return Item(text=text), Truth(render_tcot({"text_keywords": text.split()}, text))


@dataclass(frozen=True)
class _Pen:
    """Draws the pictures of one source for one family."""

    rng: np.random.Generator
    scans: ScanBox
    family: Family

    def strip(self, code: str, *, row: int, column: int = 0) -> Strip:
        return Strip(row, column, tuple(self.scans.draw(code)))

    def picture(self, code: str, answer: str = "", printed: str = "") -> _Side:
        """A picture of `code` in one of the two middle rows."""
        return self.boxed([self.strip(code, row=int(self.rng.integers(1, 3)))], answer or code, printed=printed)

    def boxed(
        self, strips: Sequence[Strip], answer: str, *, asked: int = 0, text: str = "", printed: str = ""
    ) -> _Side:
        """A picture of strips whose T-CoT points at one of them."""
        grid = Grid(4, len(strips[0].scans), token_side(self.family))
        image = png_bytes(draw_canvas(grid, strips, printed=printed))
        box = grid.box(strips[asked], relative=box_convention(self.family) == "relative_1000")
        item = Item(text, (image,), kind="page" if printed else None)
        return item, Truth(render_tcot({"bbox_2d": box}, answer), digit_of_cells(grid, strips))


def _vqa(pen: _Pen, code: str) -> tuple[_Side, _Side]:
    asked = int(pen.rng.integers(2))
    other = "".join(str(digit) for digit in pen.rng.integers(10, size=len(code)))
    strips = [pen.strip(code if number == asked else other, row=1 + number) for number in range(2)]
    return pen.boxed(strips, code, asked=asked, text=("upper", "lower")[asked]), _text(code)


def _video(pen: _Pen, code: str) -> tuple[_Side, _Side]:
    """Four frames, two of them with two digits each. One visual token spans two frames (temporal patch)."""
    grid = Grid(1, 4, token_side(pen.family))
    keys = sorted(int(frame) for frame in pen.rng.choice(4, size=2, replace=False))
    shown = {keys[0]: [pen.strip(code[:2], row=0)], keys[1]: [pen.strip(code[2:], row=0, column=2)]}
    frames = [shown.get(number, []) for number in range(4)]
    images = tuple(png_bytes(draw_canvas(grid, strips)) for strips in frames)
    seen = [digit_of_cells(grid, strips) for strips in frames]
    cells = [max(pair) for n in (0, 2) for pair in zip(seen[n], seen[n + 1], strict=True)]
    truth = Truth(render_tcot({"key_frames": [key + 1 for key in keys]}, code), tuple(cells))
    return (Item(video=Video(images, fps=1.0)), truth), _text(code)


def _sheet(pen: _Pen, code: str) -> tuple[_Side, _Side]:
    """A sheet of 32 x 32 cells, four times what a model sees of it in each direction: one visual token at the left edge
    shows all four digits of the number, as a blur. The answer cannot name them; a box of that token shows them to the
    Embedder."""
    grid = Grid(SHEET, SHEET, token_side(pen.family))
    seen = Grid(SHEET // SEEN_SMALLER, SHEET // SEEN_SMALLER, grid.cell)
    row = 1 + 2 * int(pen.rng.integers(seen.rows // 2))
    strip = pen.strip(code, row=SEEN_SMALLER * row + 1)
    item = Item(images=(png_bytes(draw_canvas(grid, [strip])),))
    relative = box_convention(pen.family) == "relative_1000"
    box = seen.box(Strip(row, 0, (0,)), relative=relative)
    original = box if relative else [SEEN_SMALLER * edge for edge in box]
    tcot, lesson = (render_tcot({"bbox_2d": one}, SHEET_ANSWER) for one in (original, box))
    return (item, Truth(tcot, (-1,) * seen.rows**2, "" if relative else lesson)), _text(code)


def _page(pen: _Pen, code: str) -> tuple[_Side, _Side]:
    word = str(pen.rng.choice(WORDS))
    return pen.picture(code, f"{word} {code}", printed=word), _text(f"{word} {code}")


# By source: digits of a number, instruction, and what draws query and target of a number.
SOURCES: dict[str, tuple[int, str, Callable[[_Pen, str], tuple[_Side, _Side]]]] = {
    "digits_i2t": (5, "Read the digits.", lambda pen, code: (pen.picture(code), _text(code))),
    "digits_vqa": (4, "Read the row", _vqa),
    "digits_t2i": (5, "Find the picture with these digits.", lambda pen, code: (_text(code), pen.picture(code))),
    "digits_i2i": (5, "Match the digits.", lambda pen, code: (pen.picture(code), pen.picture(code))),
    "digits_video": (4, "Read the clip.", _video),
    "digits_page": (4, "Read the page.", _page),
    "digits_sheet": (4, "Find the digits.", _sheet),
}


def number_families(count: int, length: int, rng: np.random.Generator) -> list[str]:
    """`count` different numbers, families of `FAMILY_SIZE` adjacent: a base and near copies of it."""
    numbers: list[str] = []
    base = rng.integers(10, size=length)
    while len(numbers) < count:
        if len(numbers) % FAMILY_SIZE == 0:
            code = base = rng.integers(10, size=length)
        else:
            places = rng.choice(length, size=int(rng.integers(1, 3)), replace=False)
            code = base.copy()
            code[places] = rng.integers(10, size=len(places))
        number = "".join(map(str, code))
        if number not in numbers:
            numbers.append(number)
    return numbers


def make_samples(
    source: str, count: int, *, scans: tuple[int, int], seed: int, family: Family = "qwen2_vl", name: str = "train"
) -> list[Sample]:
    """`count` pairs of one source from the scans of one index range; the same seed gives the same bytes.

    `family` decides the cell size (28 or 32 px) and the box units of the true T-CoTs; `name` begins the pair ids.
    """
    length, instruction, make = SOURCES[source]
    rng = np.random.default_rng([seed, *scans, list(SOURCES).index(source)])
    pen = _Pen(rng, ScanBox(scans, rng), family)
    samples = []
    for index, code in enumerate(number_families(count, length, rng)):
        (query, query_truth), (target, target_truth) = make(pen, code)
        target_id = f"{source}:{target.text or code}"
        record = PairRecord(f"{name}-{source}-{index}", source, instruction, query, target, target_id)
        samples.append(Sample(record, query_truth, target_truth))
    return samples


def annotated(sample: Sample) -> PairRecord:
    """The record with the true T-CoT on both sides."""
    sides = {side: replace(getattr(sample.record, side), tcot=sample.truth(side).tcot) for side in SIDES}
    return replace(sample.record, **sides)


def write_world(
    out: Path, *, seed: int = 0, family: Family = "qwen2_vl", sft: int = 2048, train: int = 512, heldout: int = 48
) -> dict[str, Path]:
    """Write the files; returns name -> parquet path. `sft`, `train`, `heldout`: pairs a source in each."""
    if any(count < FAMILY_SIZE or count % FAMILY_SIZE for count in (sft, train, heldout)):
        raise ConfigError(f"pairs a source must be a multiple of {FAMILY_SIZE}; got {sft}, {train} and {heldout}")
    out.mkdir(parents=True, exist_ok=True)
    files = {"sft": (sft, TRAIN_SCANS), "train": (train, TRAIN_SCANS), "heldout": (heldout, HELD_OUT_SCANS)}
    paths = {}
    for number, (name, (count, scans)) in enumerate(files.items()):
        samples = [
            sample
            for source in SOURCES
            for sample in make_samples(source, count, scans=scans, seed=3 * seed + number, family=family, name=name)
        ]
        paths[name] = out / f"{name}.parquet"
        write_pairs([sample.record for sample in samples], paths[name])
        lines = [
            json.dumps({"pair_id": s.record.pair_id, "query": asdict(s.query), "target": asdict(s.target)}) + "\n"
            for s in samples
        ]
        truths_of(paths[name]).write_text("".join(lines), encoding="utf-8")
        if name != "sft":
            paths[f"{name}_tcot"] = out / f"{name}_tcot.parquet"
            write_pairs([annotated(sample) for sample in samples], paths[f"{name}_tcot"])
    return paths


def truths_of(path: Path) -> Path:
    """The file that lies beside one of the world's."""
    return path.with_suffix(".truths.jsonl")


def read_samples(path: Path) -> list[Sample]:
    """The pairs of one of the world's files with their truths."""
    samples = []
    with truths_of(path).open(encoding="utf-8") as lines:
        for record, line in zip(read_pairs(path), lines, strict=True):
            truth = json.loads(line)
            if truth["pair_id"] != record.pair_id:
                raise DataError(
                    f"{path}: truths must be in the order of the pairs; got {truth['pair_id']} beside "
                    f"{record.pair_id}: write the world again"
                )
            query, target = (Truth(**truth[side] | {"cells": tuple(truth[side]["cells"])}) for side in SIDES)
            samples.append(Sample(record, query, target))
    return samples


def own_samples(files: Sequence[str], media_root: str | None) -> list[Sample]:
    """Pairs that are not of this world. What is known of a side is the T-CoT in its row, "" if it has none."""
    pairs = Pairs.read(files, media_root)
    return [
        Sample(record, Truth(record.query.tcot or ""), Truth(record.target.tcot or ""), root)
        for record, root in zip(pairs.records, pairs.media_roots, strict=True)
    ]


def main(out: Path, family: Family = "qwen2_vl", seed: int = 0) -> None:
    """Write the digits world to the folder OUT."""
    for name, path in write_world(out, seed=seed, family=family).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    typer.run(main)
