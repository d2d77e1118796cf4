# SPDX-License-Identifier: Apache-2.0
"""Rows of stage 1: T-CoT and evidence are in them, raw rows have neither, and every problem names its row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.contrastive.rows import (
    EncodedPair,
    PairRows,
    read_training_pairs,
    rows_of_pairs,
    unmask_ids,
    video_sources,
)
from embedrl_verl.data.identity import NO_QUERY, ContentId, content_id, target_content
from embedrl_verl.data.parquet import write_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.settings import DataSettings
from embedrl_verl.embedder import EmbedProcessor, Encoded
from embedrl_verl.embedder.info_nce import contrastive_loss
from embedrl_verl.errors import DataError, MediaError
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.reasoner import tiny_limits
from recipes.tiny_digits.world import SOURCES, annotated, make_samples


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
    assert len(batch.layout.target_content.unique(dim=0)) == 5
    # The second negative is pair 1's target, which is known by its target_id: it must not be pair 1's negative.
    masked = unmask_ids(batch.layout, batch.bare)
    shown = masked.target_content[:, 1].tolist()
    assert shown[4] == masked.query_content[1, 1] == shown[1]
    assert masked.negatives()[:, 4].tolist() == [True, False, True]
    bare = rows(some, processor, tmp_path)[0, False]
    assert bare.bare_content != bare.contents[0].target, "ids and contents live in spaces of their own"
    twins = [replace(records[0], target_id="same"), replace(records[1], target_id="same")]
    data = rows(twins, processor, tmp_path)
    assert data[0, False].contents[0].target == data[1, False].contents[0].target


def test_captions_of_one_photo_are_no_negatives_and_have_no_loss():
    photos, captions = [b"photo A", b"photo A", b"photo B"], ["a dog runs", "a brown dog on grass", "a red car"]
    pairs = [
        PairRecord(str(i), "s", "Find the caption.", Item(images=(photo,)), Item(text=caption))
        for i, (photo, caption) in enumerate(zip(photos, captions, strict=True))
    ]
    empty = Encoded(torch.tensor([1]), torch.zeros(4, 1, dtype=torch.int64))
    encoded = [EncodedPair(i, empty, empty, (), (content_id(pair, None),)) for i, pair in enumerate(pairs)]
    batch = rows_of_pairs(encoded, [0, 1, 2])
    perfect = torch.eye(8)[[0, 0, 1]]
    assert float(contrastive_loss(perfect, perfect, batch.layout).loss) < 1e-3
    assert batch.layout.negatives().tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    # On another rank's half of the batch too: numbers are places, ids are contents.
    assert rows_of_pairs(encoded[1:], [5, 6]).layout.query_content.equal(batch.layout.query_content[1:])


def test_a_hard_negative_that_is_a_caption_of_the_same_photo_is_masked_for_both_captions(records, processor, tmp_path):
    first, second, other = records[0], replace(records[1], query=records[0].query, instruction=""), records[2]
    first = replace(first, instruction="", negatives=(second.target,))
    for ids in ({}, {"target_id": ""}, {"query_id": "photo"}):
        some = [replace(one, **ids) for one in (first, second)]
        data = rows([*some, other], processor, tmp_path)
        batch = rows_of_pairs([data[i, False] for i in range(3)], range(3))
        mined = unmask_ids(batch.layout, batch.bare).negatives()[:, 3]
        assert mined.tolist() == [False, False, True], ids


def test_a_mined_answer_is_no_negative_of_any_pair_that_it_answers_however_its_ids_are_stated():
    empty = Encoded(torch.tensor([1]), torch.zeros(4, 1, dtype=torch.int64))
    answer = Item(text="x")
    for first, second in (("", "src:1"), ("src:1", ""), ("src:1", "src:2"), ("", "")):
        pairs = [
            PairRecord("a", "s", "", Item(text="q1"), answer, target_id=first),
            PairRecord("b", "s", "", Item(text="q2"), answer, target_id=second),
            PairRecord("c", "s", "", Item(text="q3"), Item(text="y")),
        ]
        bare = target_content(answer, None)
        encoded = [
            EncodedPair(i, empty, empty, (), (content_id(one, None),), target_content(one.target, None))
            for i, one in enumerate(pairs)
        ]
        mined = ContentId(NO_QUERY, bare)
        encoded[2] = replace(encoded[2], negatives=(empty,), contents=(*encoded[2].contents, mined))
        batch = rows_of_pairs(encoded, range(3))
        negatives = unmask_ids(batch.layout, batch.bare).negatives()
        assert negatives[:, 3].tolist() == [False, False, True], (first, second)
        assert negatives[:2, :2].tolist() == [[False, False], [False, False]], "they have one answer"


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
