# SPDX-License-Identifier: Apache-2.0
"""Rows of stage 1: T-CoT and evidence are in them, raw rows have neither, and every problem names its row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.contrastive.rows import (
    PairRows,
    read_training_pairs,
    rows_of_pairs,
    unmask_ids,
    video_sources,
)
from embedrl_verl.data.parquet import write_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.embedder import EmbedProcessor
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.tiny.digits import SOURCES, annotated, make_samples
from embedrl_verl.tiny.models import build_tiny_model
from embedrl_verl.tiny.reasoner import tiny_limits


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> EmbedProcessor:
    return EmbedProcessor.from_pretrained(
        build_tiny_model(tmp_path_factory.mktemp("m") / "model"), limits=tiny_limits("qwen2_vl")
    )


@pytest.fixture(scope="module")
def records() -> list[PairRecord]:
    """One pair of each source of the digits world, annotated."""
    return [annotated(make_samples(source, 4, scans=(0, 200), seed=1)[0]) for source in SOURCES]


def rows(records, processor, tmp_path, *, tcot: bool = True) -> PairRows:
    write_pairs(records, tmp_path / "pairs.parquet")
    return PairRows(
        read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=tcot),
        processor,
        media=DataSettings(family="qwen2_vl"),
        evidence=EvidenceConfig(),
        media_root=None,
        tcot=tcot,
    )


def test_annotated_rows_hold_the_tcot_and_one_more_image_for_each_piece_of_evidence(records, processor, tmp_path):
    data = rows(records, processor, tmp_path)
    for index, record in enumerate(records):
        full, raw = data[index, False], data[index, True]
        for side in ("query", "target"):
            with_tcot, without = getattr(full, side), getattr(raw, side)
            text = processor.tokenizer.decode(with_tcot.input_ids)
            assert "<answer>" in text and "<answer>" not in processor.tokenizer.decode(without.input_ids)
            pieces = [len(one.multi_modal_inputs.get("image_grid_thw", ())) for one in (with_tcot, without)]
            item = record.item(side)
            expected = 1 if item.images else (2 if item.video else 0)  # one box, or two key frames
            assert pieces[0] - pieces[1] == expected, (record.data_source, side)
        assert full.contents == raw.contents and len(full.contents) == 1


def test_without_tcots_the_rows_are_the_raw_ones(records, processor, tmp_path):
    bare = rows(records, processor, tmp_path, tcot=False)
    full = rows(records, processor, tmp_path)
    assert all(torch.equal(bare[i, False].query.input_ids, full[i, True].query.input_ids) for i in range(len(bare)))


def test_hard_negatives_follow_the_targets_and_keep_their_content(records, processor, tmp_path):
    wrong = Item(text="9 9 9")
    wrong = replace(wrong, tcot=records[0].target.tcot)
    some = [replace(records[0], negatives=(wrong, records[1].target)), *records[1:3]]
    data = rows(some, processor, tmp_path)
    batch = rows_of_pairs([data[i, False] for i in range(3)], [4, 7, 9])
    assert batch.layout.target_pair.tolist() == [4, 7, 9, -1, -1] and batch.layout.query_pair.tolist() == [4, 7, 9]
    assert len(batch.rows) == 8
    assert len(set(batch.layout.target_content.tolist())) == 5
    # The second negative is pair 1's target, which is known by its target_id: it must not be pair 1's negative.
    masked = unmask_ids(batch.layout, batch.bare)
    assert masked.target_content.tolist()[4] == masked.query_content.tolist()[1] == masked.target_content.tolist()[1]
    assert masked.negatives()[:, 4].tolist() == [True, False, True]
    bare = rows(some, processor, tmp_path)[0, False]
    assert bare.bare_content != bare.contents[0], "ids and contents live in spaces of their own"
    twins = [replace(records[0], target_id="same"), replace(records[1], target_id="same")]
    data = rows(twins, processor, tmp_path)
    assert data[0, False].contents == data[1, False].contents


def test_video_sources_are_found_by_their_records(records, processor, tmp_path):
    write_pairs(records, tmp_path / "pairs.parquet")
    assert video_sources(read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=True)) == {"digits_video"}


def test_a_side_without_tcot_is_named_with_file_and_row(records, tmp_path):
    some = [records[0], replace(records[1], target=replace(records[1].target, tcot=" "))]
    write_pairs(some, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"1 problem.*\n.*pairs.parquet, row 1, pair .*: target.tcot is empty"):
        read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=True)
    assert len(read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=False)) == 2


def test_a_hard_negative_without_tcot_is_named(records, tmp_path):
    some = [records[0], replace(records[1], negatives=(records[0].target, Item(text="7 7 7")))]
    write_pairs(some, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"row 1, pair .*: negatives\[1\].tcot is empty"):
        read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=True)


def test_a_medium_that_cannot_be_read_is_named_with_file_row_and_side(records, processor, tmp_path):
    some = [records[0], replace(records[1], query=replace(records[1].query, images=(b"no image",)))]
    data = rows(some, processor, tmp_path)
    with pytest.raises(MediaError, match=r"pairs.parquet, row 1, pair .*, query: "):
        data[1, False]


def test_no_pairs_at_all_is_an_error(tmp_path):
    write_pairs([], tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="no pair records in"):
        read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=True)
