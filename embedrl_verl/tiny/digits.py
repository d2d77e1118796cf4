# SPDX-License-Identifier: Apache-2.0
"""The digits world: retrieval pairs over real handwritten digits, with the true T-CoT of each side.

Six data sources, all about reading a number off a canvas:

| source | query | target |
|---|---|---|
| digits_i2t | picture of five digits | the number as text |
| digits_vqa | picture with two rows + "upper" or "lower" | that row's number |
| digits_t2i | a number | picture of it |
| digits_i2i | picture of five digits | another writer's picture of the same number |
| digits_video | four frames, two of them with two digits each | the number as text |
| digits_page | page with a printed word and a handwritten number | word and number |

Numbers come in families of four that differ in one or two digits, so that a single misread digit finds the wrong
candidate. Three files: `sft.parquet` (few scans, with T-CoTs for the cold start), `train.parquet` (contrastive stage
and RL), `heldout.parquet` (scans that no stage trains on). Each has a `.tcots.jsonl` beside it: {pair_id, query, target}.

Command: `python -m embedrl_verl.tiny.digits --out DIR [--family qwen2_vl] [--seed 0]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from embedrl_verl.data.schema import Item, PairRecord, Video, write_pairs
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import box_convention, token_side
from embedrl_verl.tiny.canvas import (
    HELD_OUT_SCANS,
    SFT_SCANS,
    TRAIN_SCANS,
    Grid,
    ScanBox,
    Strip,
    draw_canvas,
    png_bytes,
)
from embedrl_verl.tiny.models import TinyFamily

FAMILY_SIZE = 4  # numbers that differ in one or two digits
WORDS = ("parcel", "ticket", "receipt", "invoice", "locker", "report", "voucher", "permit")


@dataclass(frozen=True)
class Sample:
    """One pair and the true T-CoT of each side."""

    record: PairRecord
    query_tcot: str
    target_tcot: str


@dataclass(frozen=True)
class WorldSize:
    """Pairs a source in each file."""

    sft: int = 256
    train: int = 512
    heldout: int = 48

    def __post_init__(self) -> None:
        for name in ("sft", "train", "heldout"):
            value = getattr(self, name)
            if value < FAMILY_SIZE or value % FAMILY_SIZE:
                raise ConfigError(f"{name} must be a positive multiple of {FAMILY_SIZE} (families); got {value}")


@dataclass(frozen=True)
class _Pen:
    """Everything that drawing one file's pictures needs."""

    rng: np.random.Generator
    scans: ScanBox
    family: TinyFamily

    @property
    def cell(self) -> int:
        return token_side(self.family)

    def strip(self, code: str, grid: Grid, *, row: int | None = None) -> Strip:
        """A strip of `code` at a random column, in the given row or a random one."""
        column = int(self.rng.integers(grid.columns - len(code) + 1))
        return Strip(int(self.rng.integers(grid.rows)) if row is None else row, column, tuple(self.scans.draw(code)))

    def draw(self, grid: Grid, strips: Sequence[Strip], printed: str = "") -> bytes:
        return png_bytes(draw_canvas(grid, strips, rng=self.rng, printed=printed))

    def picture(self, code: str) -> tuple[Item, str]:
        """A picture of `code` and its true T-CoT."""
        grid = Grid(2, 6, self.cell)
        strip = self.strip(code, grid)
        return Item(images=(self.draw(grid, [strip]),)), self.tcot_of_box(grid, strip, code)

    def tcot_of_box(self, grid: Grid, strip: Strip, answer: str) -> str:
        box = grid.box(strip, relative=box_convention(self.family) == "relative_1000")
        return render_tcot({"bbox_2d": list(box)}, answer)


def render_tcot(evidence: dict[str, list[int] | list[str]], answer: str) -> str:
    """The compact T-CoT: evidence alone as thinking, a word as check, the number as answer."""
    thinking = json.dumps(evidence, separators=(",", ":"))
    return f"<thinking>{thinking}</thinking><rethink>ok</rethink><answer>{answer}</answer>"


def _text(text: str) -> tuple[Item, str]:
    return Item(text=text), render_tcot({"text_keywords": text.split()}, text)


def _i2t(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    return pen.picture(code), _text(code), "Read the digits."


def _t2i(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    return _text(code), pen.picture(code), "Find the picture with these digits."


def _i2i(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    return pen.picture(code), pen.picture(code), "Find the same digits."


def _vqa(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    grid = Grid(2, 5, pen.cell)
    asked = int(pen.rng.integers(2))
    other = "".join(str(digit) for digit in pen.rng.integers(10, size=len(code)))
    strips = [pen.strip(code if row == asked else other, grid, row=row) for row in range(2)]
    query = Item(text=("upper", "lower")[asked], images=(pen.draw(grid, strips),))
    return (query, pen.tcot_of_box(grid, strips[asked], code)), _text(code), "Read this row."


def _video(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    grid = Grid(1, 4, pen.cell)
    keys = sorted(int(frame) + 1 for frame in pen.rng.choice(4, size=2, replace=False))
    shown = dict(zip(keys, (code[:2], code[2:]), strict=True))
    frames = tuple(pen.draw(grid, [pen.strip(shown[n], grid)] if n in shown else []) for n in range(1, 5))
    query = Item(video=Video(frames=frames, fps=1.0))
    return (query, render_tcot({"key_frames": keys}, code)), _text(code), "Read the clip."


def _page(pen: _Pen, code: str) -> tuple[tuple[Item, str], tuple[Item, str], str]:
    grid = Grid(3, 5, pen.cell)
    word = str(pen.rng.choice(WORDS))
    strip = pen.strip(code, grid, row=int(pen.rng.integers(1, 3)))
    query = Item(images=(pen.draw(grid, [strip], printed=word),), kind="page")
    return (query, pen.tcot_of_box(grid, strip, f"{word} {code}")), _text(f"{word} {code}"), "Read the page."


_Maker = Callable[[_Pen, str], tuple[tuple[Item, str], tuple[Item, str], str]]
# Source -> (digits of a number, maker).
SOURCES: dict[str, tuple[int, _Maker]] = {
    "digits_i2t": (5, _i2t),
    "digits_vqa": (4, _vqa),
    "digits_t2i": (5, _t2i),
    "digits_i2i": (5, _i2i),
    "digits_video": (4, _video),
    "digits_page": (4, _page),
}


def number_families(count: int, length: int, rng: np.random.Generator) -> list[str]:
    """Draw `count` different numbers, families of `FAMILY_SIZE` adjacent: a base and near copies of it."""
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
    source: str, count: int, *, scans: tuple[int, int], seed: int, family: TinyFamily = "qwen2_vl", name: str = "train"
) -> list[Sample]:
    """Make `count` pairs of one source from the scans of one index range.

    Args:
        source: a key of `SOURCES`.
        count: number of pairs.
        scans: scan indices [first, past the last).
        seed: the same seed gives the same bytes.
        family: decides the cell size (28 or 32 px) and the box units of the true T-CoTs.
        name: first part of the pair ids.
    """
    length, maker = SOURCES[source]
    rng = np.random.default_rng([seed, *scans, list(SOURCES).index(source)])
    pen = _Pen(rng, ScanBox(scans, rng), family)
    samples = []
    for index, code in enumerate(number_families(count, length, rng)):
        (query, query_tcot), (target, target_tcot), instruction = maker(pen, code)
        content = f"{source}:{target.text or code}"
        record = PairRecord(f"{name}-{source}-{index}", source, instruction, query, target, content)
        samples.append(Sample(record, query_tcot, target_tcot))
    return samples


def write_world(
    out_dir: str | Path, *, seed: int = 0, family: TinyFamily = "qwen2_vl", size: WorldSize | None = None
) -> dict[str, Path]:
    """Write the three files with their T-CoTs; returns name -> parquet path."""
    size = size or WorldSize()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    plan = {
        "sft": (size.sft, SFT_SCANS),
        "train": (size.train, TRAIN_SCANS),
        "heldout": (size.heldout, HELD_OUT_SCANS),
    }
    paths = {}
    for number, (name, (count, scans)) in enumerate(plan.items()):
        samples = [
            sample
            for source in SOURCES
            for sample in make_samples(source, count, scans=scans, seed=3 * seed + number, family=family, name=name)
        ]
        paths[name] = out / f"{name}.parquet"
        write_pairs([sample.record for sample in samples], paths[name])
        lines = (
            json.dumps({"pair_id": s.record.pair_id, "query": s.query_tcot, "target": s.target_tcot}) for s in samples
        )
        paths[name].with_suffix(".tcots.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the digits world."""
    parser = argparse.ArgumentParser(prog="python -m embedrl_verl.tiny.digits", description=write_world.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=get_args(TinyFamily), default="qwen2_vl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, path in write_world(args.out, seed=args.seed, family=args.family).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
