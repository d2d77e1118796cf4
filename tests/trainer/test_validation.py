# SPDX-License-Identifier: Apache-2.0
"""Validation metrics see the whole set, not its batches."""

import torch

from embedrl_verl.trainer.validation import RetrievalValidation, ValidationRow, card_scores


def _row(source, side, content, vector, session=0):
    embedding = None if vector is None else torch.nn.functional.normalize(torch.tensor(vector), dim=0)
    return ValidationRow(source, side, session, content, embedding)


def test_hits_do_not_depend_on_how_the_set_was_cut_into_batches():
    rows = [
        _row("a", 0, 1, [1.0, 0.0]),
        _row("a", 0, 2, [0.0, 1.0]),
        _row("a", 1, 1, [0.9, 0.1]),
        _row("a", 1, 2, [1.0, 0.0]),  # nearer to query 1 than its own target is
    ]
    whole, parts = RetrievalValidation(5), RetrievalValidation(5)
    whole.add(rows)
    for row in reversed(rows):
        parts.add([row])
    first = whole.metrics()
    assert first == parts.metrics()
    assert first["val-core/a/hit@1"] == 0.0
    assert 0 < first["val-core/a/ndcg@5"] < 1
    assert whole.metrics() == {}


def test_targets_of_the_same_content_are_all_relevant():
    validation = RetrievalValidation(5)
    validation.add([_row("a", 0, 7, [1.0, 0.0]), _row("a", 1, 7, [0.0, 1.0]), _row("a", 1, 7, [1.0, 0.0])])
    assert validation.metrics()["val-core/a/hit@1"] == 1.0


def test_a_failed_embedding_is_a_miss_and_is_reported():
    validation = RetrievalValidation(5)
    validation.add(
        [
            _row("a", 0, 1, None),
            _row("a", 1, 1, [1.0, 0.0]),
            _row("a", 0, 2, [0.0, 1.0]),
            _row("a", 1, 2, [0.0, 1.0]),
            _row("b", 0, 3, [1.0, 0.0]),
            _row("b", 1, 3, [1.0, 0.0]),
        ]
    )
    metrics = validation.metrics()
    assert metrics["val-core/a/hit@1"] == 0.5
    assert metrics["val-aux/a/failed_rows"] == 1.0
    assert metrics["val-core/b/hit@1"] == 1.0
    assert metrics["val-core/all/hit@1"] == 0.75


def test_several_rollouts_of_a_prompt_are_averaged():
    validation = RetrievalValidation(5)
    for session, vector in enumerate(([1.0, 0.0], [0.0, 1.0])):
        validation.add(
            [
                _row("a", 0, 1, vector, session),
                _row("a", 1, 1, [1.0, 0.0], session),
                _row("a", 1, 2, [0.0, 1.0], session),
            ]
        )
    assert validation.metrics()["val-core/a/hit@1"] == 0.5


def test_card_scores_keep_the_core_scores_under_readable_names():
    metrics = {"val-core/birds/hit@1": 0.5, "raw/val-core/all/ndcg@5": 0.25, "val-aux/birds/failed_rows": 3.0}
    assert card_scores(metrics) == {"hit@1 (birds)": 0.5, "ndcg@5 (all, raw input)": 0.25}
