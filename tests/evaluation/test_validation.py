# SPDX-License-Identifier: Apache-2.0
"""Validation metrics see the whole set, not its batches."""

from types import SimpleNamespace

import pytest
import torch

from embedrl_verl.data.identity import ContentId
from embedrl_verl.evaluation.validation import (
    RetrievalValidation,
    ValidationRow,
    card_scores,
    left_out_metrics,
    metric_name,
    roster,
)
from embedrl_verl.trainer.egrl import EGRLTrainerSync


def _row(source, side, content, vector, session=0):
    embedding = None if vector is None else torch.nn.functional.normalize(torch.tensor(vector), dim=0)
    ids = ContentId(content, content) if isinstance(content, int) else ContentId(*content)
    return ValidationRow(source, side, session, ids, embedding)


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


def _scores(contents, queries, targets):
    validation = RetrievalValidation(5)
    validation.add([_row("a", 0, ids, queries[i]) for i, ids in enumerate(contents)])
    validation.add([_row("a", 1, ids, targets[i]) for i, ids in enumerate(contents)])
    metrics = validation.metrics()
    return metrics["val-core/a/hit@1"], metrics["val-core/a/ndcg@5"]


def test_all_targets_of_an_equal_query_are_relevant():
    photo, other = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    captions = [(1, 10), (1, 20), (2, 30)]
    assert _scores(captions, [photo, photo, other], [photo, photo, other]) == (1.0, 1.0)
    # Each query is nearest to the other caption of its photo: right for the photo, and the third is missed.
    near = [[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [1.0, 0.0, 0.0]]
    hit, ndcg = _scores(captions, [near[1], near[0], near[0]], near)
    assert hit == pytest.approx(2 / 3) and ndcg < 1
    # NDCG asks for all of them: one of the photo's captions behind the car's costs.
    assert _scores(captions, [photo, photo, other], [photo, [0.0, 0.0, 1.0], [0.1, 1.0, 0.0]])[1] < 1


def test_relevance_does_not_go_on_from_pair_to_pair():
    """q1-t1, q1-t2, q2-t2: the first query does not look for the third pair's row, nor the third for the first's."""
    chain, axes = [(1, 10), (1, 20), (2, 20)], torch.eye(3).tolist()
    assert _scores(chain, [axes[2], axes[0], axes[0]], axes)[0] == pytest.approx(1 / 3)
    assert _scores(chain, [axes[1], axes[2], axes[1]], axes)[0] == 1.0


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


def _complete(queries, sessions=1):
    """A set of four pairs, of which queries 0 and 1 find their target and 2 and 3 another one; and its roster."""
    unit, rows = torch.eye(4), []
    for i in range(4):
        for session in range(sessions):
            ids = ContentId(i, i)
            rows.append(ValidationRow("a", 0, session, ids, unit[i] if i < 2 else unit[(i + 1) % 4], f"p{i}"))
            rows.append(ValidationRow("a", 1, session, ids, unit[i], f"p{i}"))
    contents = [ContentId(i, i) for i in range(4)]
    data = SimpleNamespace(pair_sources=["a"] * 4, pair_ids=[f"p{i}" for i in range(4)], contents=contents)
    return [row for row in rows if row.side == 1 or row.content.target in queries], roster(data, sessions)


@pytest.mark.parametrize(("there", "hit1"), [((0, 1, 2, 3), 0.5), ((0, 1), 0.5), ((2, 3), 0.0), ((), 0.0)])
def test_a_query_whose_rollout_was_lost_is_a_miss_and_is_counted(there, hit1):
    rows, expected = _complete(there)
    validation = RetrievalValidation(5)
    validation.add(rows)
    metrics = validation.metrics(expected)
    assert metrics["val-core/a/hit@1"] == metrics["val-core/all/hit@1"] == hit1
    assert metrics["val-core/a/ndcg@5"] <= 0.75
    assert metrics["val-aux/a/failed_rows"] == 4 - len(there)


def test_a_lost_target_is_a_miss_of_its_query_alone_and_a_source_may_be_lost_whole():
    rows, expected = _complete((0, 1, 2, 3))
    validation = RetrievalValidation(5)
    validation.add([row for row in rows if not (row.side == 1 and row.content.target == 0)])
    metrics = validation.metrics(expected)
    assert (metrics["val-core/a/hit@1"], metrics["val-aux/a/failed_rows"]) == (0.25, 1.0)
    validation.add(rows)
    metrics = validation.metrics(
        [*expected, *(ValidationRow("b", side, 0, ContentId(9, 9), None, "q") for side in (0, 1))]
    )
    assert (metrics["val-core/b/hit@1"], metrics["val-aux/b/failed_rows"]) == (0.0, 2.0)
    assert metrics["val-core/all/hit@1"] == 0.25


def test_one_lost_rollout_of_several_counts_in_its_own_pass():
    rows, expected = _complete((0, 1, 2, 3), sessions=2)
    validation = RetrievalValidation(5)
    validation.add([row for row in rows if (row.side, row.session, row.content.target) != (0, 1, 0)])
    metrics = validation.metrics(expected)
    assert (metrics["val-core/a/hit@1"], metrics["val-aux/a/failed_rows"]) == ((0.5 + 0.25) / 2, 1.0)


@pytest.mark.parametrize("source", ["all", "a/b", "50%", "%61ll", "all/hit@1", "Bilder, groß"])
def test_a_source_of_any_name_has_its_scores_and_leaves_the_mean_alone(source):
    validation = RetrievalValidation(5)
    for name, found in ((source, [1.0, 0.0]), ("other", [0.0, 1.0])):
        validation.add([_row(name, 0, 1, found), _row(name, 1, 1, [1.0, 0.0]), _row(name, 1, 2, [0.0, 1.0])])
    metrics = validation.metrics()
    assert metrics[f"val-core/{metric_name(source)}/hit@1"] == 1.0
    assert metrics["val-core/all/hit@1"] == 0.5
    scores = card_scores(metrics)
    shown = "'all'" if source == "all" else source
    assert scores[f"hit@1 ({shown})"] == 1.0 and scores["hit@1 (all)"] == 0.5 and scores["hit@1 (other)"] == 0.0
    assert len(scores) == 6


def test_an_unknown_reward_is_left_out_of_verls_own_mean():
    trainer = object.__new__(EGRLTrainerSync)
    infos = {"reward": [0.6, 0.0, 0.2, 0.0], "score": [0.6, None, 0.2, None], "format": [1.0, 1.0, 0.0, None]}
    metrics = trainer._val_metrics_update(["a", "a", "a", "b"], ["1", "2", "3", "4"], infos, [2, 2, 2, 2])
    assert metrics["val-core/a/reward/mean@1"] == pytest.approx(0.4)
    assert metrics["val-aux/a/format/mean@1"] == pytest.approx(2 / 3)
    assert not any("/b/" in name for name in metrics)


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


def test_a_rollout_is_no_candidate_of_another_pass():
    """Each pass is perfect alone; the second one's other target is nearer to the first one's query than its own is."""
    validation, x, y = RetrievalValidation(5), [1.0, 0.0], [0.0, 1.0]
    for session, (one, other) in enumerate((([0.8, 0.6], y), (y, x))):
        query = x if session == 0 else y
        validation.add([_row("a", 0, 1, query, session), _row("a", 1, 1, one, session)])
        validation.add([_row("a", 0, 2, other, session), _row("a", 1, 2, other, session)])
    metrics = validation.metrics()
    assert metrics["val-core/a/hit@1"] == metrics["val-core/a/ndcg@5"] == 1.0


def test_card_scores_keep_the_core_scores_under_readable_names():
    metrics = {"val-core/birds/hit@1": 0.5, "raw/val-core/all/ndcg@5": 0.25, "val-aux/birds/failed_rows": 3.0}
    assert card_scores(metrics) == {"hit@1 (birds)": 0.5, "ndcg@5 (all, raw input)": 0.25}


def test_pairs_that_are_too_long_are_counted_by_source_where_steps_are_not_put_together():
    train = SimpleNamespace(left_out={"xsum": 3, "a/b": 1}, pair_ids=list("abcdef"))
    validation = SimpleNamespace(left_out={}, pair_ids=list("ab"))
    totals = {"data/left_out/train": 4.0, "data/pairs/train": 10.0}
    assert left_out_metrics(train, validation, by_source=False) == totals
    by_source = {"data/left_out/train/xsum": 3.0, "data/left_out/train/a%2Fb": 1.0}
    assert left_out_metrics(train, validation, by_source=True) == totals | by_source
