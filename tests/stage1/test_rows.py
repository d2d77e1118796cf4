# SPDX-License-Identifier: Apache-2.0
"""Rows of stage 1: T-CoT and evidence are in them, raw rows have neither, and every problem names its row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from embedrl_verl.config.schema import EvidenceConfig, MediaConfig
from embedrl_verl.data.identity import NO_QUERY, content_id, target_content
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder import EmbedProcessor, Encoded, messages
from embedrl_verl.embedder.info_nce import contrastive_loss
from embedrl_verl.errors import DataError, MediaError
from embedrl_verl.families import facts_of
from embedrl_verl.stage1 import rows as rows_module
from embedrl_verl.stage1.rows import EncodedPair, PairRows, items_of, read_training_pairs, rows_of_pairs
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.settings import tiny_limits
from recipes.tiny_digits.world import SOURCES, annotated, make_samples

EMPTY = Encoded(torch.tensor([1]), torch.zeros(4, 1, dtype=torch.int64))


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> EmbedProcessor:
    return EmbedProcessor.from_pretrained(
        build_tiny_model(tmp_path_factory.mktemp("m") / "model"), limits=tiny_limits("qwen2_vl")
    )


@pytest.fixture(scope="module")
def records() -> list[PairRecord]:
    """One pair of each source of the digits world, annotated."""
    return [annotated(make_samples(source, 4, scans=(0, 200), seed=1)[0]) for source in SOURCES]


@pytest.fixture
def rows(processor, tmp_path):
    """`rows(records)`: their `PairRows`, through a file."""

    def make(records: list[PairRecord], *, tcot: bool = True, family: str = "qwen2_vl") -> PairRows:
        write_pairs(records, tmp_path / "pairs.parquet")
        return PairRows(
            read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=tcot),
            processor,
            media=MediaConfig(family=family),
            evidence=EvidenceConfig(),
            media_root=None,
            tcot=tcot,
        )

    return make


def test_annotated_rows_hold_the_tcot_and_one_more_image_for_each_piece_of_evidence(records, processor, rows):
    data, untold = rows(records), rows(records, tcot=False)
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
        assert items_of(record)["query"].instruction == record.instruction != ""
        assert torch.equal(untold[index, False].query.input_ids, raw.query.input_ids)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_boxes_in_pixels_are_cut_where_the_writer_saw_them(family, records, rows, monkeypatch):
    told = []
    cut = messages.cut_evidence
    monkeypatch.setattr(messages, "cut_evidence", lambda *a, **k: told.append(k["resized_sizes"]) or cut(*a, **k))
    [record] = [one for one in records if one.data_source == "digits_i2t"]
    rows([record], family=family)[0, False]
    seen = told[0]
    if facts_of(family).boxes == "absolute":
        assert len(seen) == 1 and all(side % 28 == 0 for side in seen[0])
        assert seen[0][0] * seen[0][1] >= MediaConfig().image_min_tokens * 28**2
    else:
        assert seen is None


def test_media_are_hashed_once_a_pair_however_often_it_is_drawn(records, rows, monkeypatch):
    hashed = []
    digest = rows_module.content_id
    monkeypatch.setattr(rows_module, "content_id", lambda *a: hashed.append(1) or digest(*a))
    data = rows(records[:2])
    first, again, other = data[0, False], data[0, True], data[1, False]
    assert len(hashed) == 2 and first.contents == again.contents != other.contents


def negatives(pairs: list[EncodedPair]) -> list[list[bool]]:
    return rows_of_pairs(pairs, range(len(pairs))).layout.negatives().tolist()


def test_hard_negatives_follow_the_targets_and_keep_their_content(records, rows):
    wrong = replace(Item(text="9 9 9"), tcot=records[0].target.tcot)
    data = rows([replace(records[0], negatives=(wrong, records[1].target)), *records[1:3]])
    pairs = [data[i, False] for i in range(3)]
    batch = rows_of_pairs(pairs, [4, 7, 9])
    assert batch.layout.target_pair.tolist() == [4, 7, 9, -1, -1] and batch.layout.query_pair.tolist() == [4, 7, 9]
    assert len(batch.rows) == 8
    # The second negative is pair 1's target, which is known by its target_id: it must not be pair 1's negative.
    assert [row[3:] for row in negatives(pairs)] == [[True, True], [True, False], [True, True]]
    twins = rows([replace(record, target_id="same") for record in records[:2]])
    assert twins[0, False].contents[0][1] == twins[1, False].contents[0][1]


def test_captions_of_one_photo_are_no_negatives_and_have_no_loss():
    photos, captions = [b"photo A", b"photo A", b"photo B"], ["a dog runs", "a brown dog on grass", "a red car"]
    pairs = [
        PairRecord(str(i), "s", "Find the caption.", Item(images=(photo,)), Item(text=caption))
        for i, (photo, caption) in enumerate(zip(photos, captions, strict=True))
    ]
    encoded = [EncodedPair(EMPTY, EMPTY, (), (content_id(pair, None),)) for pair in pairs]
    batch = rows_of_pairs(encoded, [0, 1, 2])
    perfect = torch.eye(8)[[0, 0, 1]]
    assert float(contrastive_loss(perfect, perfect, batch.layout).loss) < 1e-3
    assert batch.layout.negatives().tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    # On another rank's half of the batch too: numbers are places, ids are contents.
    assert rows_of_pairs(encoded[1:], [5, 6]).layout.query_content.equal(batch.layout.query_content[1:])


def test_a_hard_negative_that_is_a_caption_of_the_same_photo_is_masked_for_both_captions(records, rows):
    first, second, other = records[0], replace(records[1], query=records[0].query, instruction=""), records[2]
    first = replace(first, instruction="", negatives=(second.target,))
    for ids in ({}, {"target_id": ""}, {"query_id": "photo"}):
        data = rows([*(replace(one, **ids) for one in (first, second)), other])
        assert [row[3] for row in negatives([data[i, False] for i in range(3)])] == [False, False, True], ids


@pytest.mark.parametrize("ids", [("", "src:1"), ("src:1", ""), ("src:1", "src:2"), ("", "")])
def test_a_mined_answer_is_no_negative_of_any_pair_that_it_answers_however_its_ids_are_stated(ids, records, rows):
    answer = replace(Item(text="x"), tcot=records[0].target.tcot)
    asked = [replace(answer, text=text) for text in ("q1", "q2", "q3", "y")]
    data = rows(
        [
            PairRecord("a", "s", "", asked[0], answer, target_id=ids[0]),
            PairRecord("b", "s", "", asked[1], answer, target_id=ids[1]),
            PairRecord("c", "s", "", asked[2], asked[3], negatives=(answer,)),
        ]
    )
    pairs = [data[i, False] for i in range(3)]
    shown = target_content(answer, None)
    assert (
        pairs[2].contents[1] == (NO_QUERY, shown, shown) and [pair.contents[0][2] for pair in pairs[:2]] == [shown] * 2
    )
    found = negatives(pairs)
    assert [row[3] for row in found] == [False, False, True]
    assert [row[:2] for row in found[:2]] == [[False, False], [False, False]], "they have one answer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one, other: {"target": replace(one.target, tcot=" ")}, r"target\.tcot is empty"),
        (lambda one, other: {"negatives": (other.target, Item(text="7"))}, r"negatives\[1\]\.tcot is empty"),
    ],
)
def test_what_has_no_tcot_is_named_with_file_and_row(change, message, records, tmp_path):
    file = tmp_path / "pairs.parquet"
    write_pairs([records[0], replace(records[1], **change(records[1], records[0]))], file)
    with pytest.raises(DataError, match=rf"1 problem.*\n.*pairs.parquet, row 1, pair .*: {message}"):
        read_training_pairs([str(file)], tcot=True)
    assert len(read_training_pairs([str(file)], tcot=False)) == 2


def test_a_medium_that_cannot_be_read_is_named_with_file_row_and_side(records, rows):
    data = rows([records[0], replace(records[1], query=replace(records[1].query, images=(b"no image",)))])
    with pytest.raises(MediaError, match=r"pairs.parquet, row 1, pair .*, query: "):
        data[1, False]


def test_no_pairs_at_all_is_an_error(tmp_path):
    write_pairs([], tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="no pair records in"):
        read_training_pairs([str(tmp_path / "pairs.parquet")], tcot=True)
