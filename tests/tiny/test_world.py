# SPDX-License-Identifier: Apache-2.0
"""The digits world is what it claims to be: real scans, never shared between splits, with true T-CoTs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from embedrl_verl.data.media import load_item
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import SIDES, input_kind
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import FAMILIES, Family, token_side
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND
from embedrl_verl.tcot import cut_evidence, format_reward, parse_tcot
from recipes.tiny_digits.canvas import HELD_OUT_SCANS, TRAIN_SCANS, Grid, ScanBox, Strip, draw_canvas
from recipes.tiny_digits.world import (
    FAMILY_SIZE,
    SHEET_ANSWER,
    SOURCES,
    Sample,
    cut_short,
    make_samples,
    number_families,
    parts_of,
    read_samples,
    write_world,
)


def samples_of(source: str, family: Family = "qwen2_vl", count: int = 12) -> list[Sample]:
    return make_samples(source, count, scans=HELD_OUT_SCANS, seed=5, family=family)


def test_scans_of_training_and_held_out_never_meet() -> None:
    assert TRAIN_SCANS[1] <= HELD_OUT_SCANS[0] and HELD_OUT_SCANS[1] == len(load_digits().target) == 1797
    for span in (TRAIN_SCANS, HELD_OUT_SCANS):
        drawn = ScanBox(span, np.random.default_rng(0)).draw("0123456789" * 20)
        assert all(span[0] <= scan < span[1] for scan in drawn)
        assert "".join(str(load_digits().target[scan]) for scan in drawn) == "0123456789" * 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_true_tcots_are_well_formed_and_carry_the_evidence_of_their_kind(source: str, family: Family) -> None:
    for sample in samples_of(source, family):
        for side in SIDES:
            tcot = parse_tcot(sample.truth(side).tcot, num_frames=4, num_images=1)
            assert format_reward(tcot, EVIDENCE_KEY_OF_KIND[input_kind(sample.record, side)]) == 1.0
            expected = sample.record.target_id.split(":")[1]
            assert tcot.answer == (SHEET_ANSWER if sample.truth(side).cells and source == "digits_sheet" else expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["digits_i2t", "digits_vqa", "digits_page"])
def test_the_true_box_cuts_exactly_the_strip(source: str, family: Family) -> None:
    cell = token_side(family)
    for sample in samples_of(source, family):
        item = load_item(sample.record.query, None)
        cells = np.array(sample.query.cells).reshape(item.images[0].height // cell, -1)
        answer = [int(digit) for digit in parse_tcot(sample.query.tcot).answer if digit.isdigit()]
        row = next(row for row in range(len(cells)) if cells[row].tolist() == answer)
        assert item.text == {"digits_vqa": ("upper", "lower")[row - 1]}.get(source, "")
        (crop,) = cut_evidence(parse_tcot(sample.query.tcot), images=item.images, frames=(), family=family).images
        strip = np.asarray(item.images[0])[row * cell : (row + 1) * cell]
        assert np.array_equal(np.asarray(crop), strip)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sheet_is_blurred_to_one_token_and_its_box_cuts_that_token_in_full_size(family: Family) -> None:
    cell = token_side(family)
    for sample in samples_of("digits_sheet", family):
        (sheet,) = load_item(sample.record.query, None).images
        tokens = sheet.resize((8 * cell, 8 * cell))
        dark = [
            (x, y)
            for x in range(8)
            for y in range(8)
            if np.asarray(tokens)[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].min() < 128
        ]
        (crop,) = cut_evidence(parse_tcot(sample.query.tcot), images=[sheet], frames=(), family=family).images
        assert len(dark) == 1 and crop.size == (4 * cell, 4 * cell)
        (x, y), side = dark[0], 4 * cell
        assert np.array_equal(np.asarray(crop), np.asarray(sheet)[y * side : (y + 1) * side, x * side : (x + 1) * side])
        assert sample.target.tcot.endswith(f"<answer>{sample.record.target.text}</answer>")
        seen = parse_tcot(sample.query.lesson or sample.query.tcot)
        again = cut_evidence(seen, images=[sheet], frames=(), family=family, resized_sizes=[tokens.size])
        assert np.array_equal(np.asarray(again.images[0]), np.asarray(crop)), (
            "the same from what a Reasoner has to write"
        )


def test_key_frames_are_the_frames_with_ink() -> None:
    for sample in samples_of("digits_video"):
        frames = load_item(sample.record.query, None).frames
        with_ink = [number for number, frame in enumerate(frames, start=1) if np.asarray(frame).min() < 128]
        assert list(parse_tcot(sample.query.tcot).key_frames) == with_ink
        assert sum(cell >= 0 for cell in sample.query.cells) == 4


def test_numbers_differ_and_families_differ_in_one_or_two_digits() -> None:
    numbers = number_families(40, 5, np.random.default_rng(1))
    assert len(set(numbers)) == 40
    for start in range(0, 40, FAMILY_SIZE):
        base, *near = numbers[start : start + FAMILY_SIZE]
        assert all(1 <= sum(a != b for a, b in zip(base, one, strict=True)) <= 2 for one in near)


def test_pictures_are_dark_on_white_and_follow_the_scan() -> None:
    grid = Grid(2, 3)
    image = np.asarray(draw_canvas(grid, [Strip(1, 0, (0, 1))]))
    assert image.shape == (56, 84)
    assert (image[:28] == 255).all() and (image[28:, 56:] == 255).all() and image[28:, :28].min() < 60
    assert image[28:, :28].mean() > 128, "ink is less than paper"
    assert not np.array_equal(image, np.asarray(draw_canvas(grid, [Strip(1, 0, (0, 2))])))
    assert (np.asarray(draw_canvas(grid, [], printed="no"))[:28] < 128).any()


def test_a_world_is_reproduced_bit_by_bit_and_its_annotated_files_hold_the_same_pairs(tmp_path: Path) -> None:
    size = {"sft": 4, "train": 8, "heldout": 4}
    paths = write_world(tmp_path / "a", seed=2, **size)
    again, other = write_world(tmp_path / "b", seed=2, **size), write_world(tmp_path / "c", seed=3, **size)
    for name, count in size.items():
        samples = read_samples(paths[name])
        assert samples == read_samples(again[name]) != read_samples(other[name])
        assert len({s.record.pair_id for s in samples}) == count * len(SOURCES)
        if name != "sft":
            records = list(read_pairs(paths[f"{name}_tcot"]))
            assert [(r.query.tcot, r.target.tcot) for r in records] == [(s.query.tcot, s.target.tcot) for s in samples]
            bare = [replace(r, query=replace(r.query, tcot=""), target=replace(r.target, tcot="")) for r in records]
            assert bare == [s.record for s in samples]
    held_out = [
        s for source in SOURCES for s in make_samples(source, 4, scans=HELD_OUT_SCANS, seed=3 * 2 + 2, name="heldout")
    ]
    assert read_samples(paths["heldout"]) == held_out, "a scan that was trained on"
    truths = paths["sft"].with_suffix(".truths.jsonl")
    lines = truths.read_text().splitlines(keepends=True)
    truths.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(DataError, match="truths must be in the order of the pairs; got sft-digits_i2t-1"):
        read_samples(paths["sft"])
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        write_world(tmp_path, heldout=6)


def test_a_short_answer_keeps_the_evidence_and_the_words() -> None:
    tcot = '<thinking>{"bbox_2d":[0,250,1000,500]}</thinking><rethink>ok</rethink><answer>parcel 3071</answer>'
    assert cut_short(tcot) == tcot.replace("3071", "3")
    assert cut_short(tcot.replace("parcel 3071", "digits")) == (
        '<thinking>{"bbox_2d":[0,0,1000,1000]}</thinking><rethink>ok</rethink><answer>digits</answer>'
    ), "of a number that it cannot read it says that it is somewhere"
    assert parts_of(tcot, "answer_only") == "<answer>parcel 3071</answer>"
    assert parts_of(tcot, "no_evidence") == parts_of(tcot, "full") == tcot
    with pytest.raises(DataError, match="with answer_only a T-CoT must have an <answer>; got 'mine'"):
        parts_of("mine", "answer_only")
