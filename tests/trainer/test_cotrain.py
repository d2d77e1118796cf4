# SPDX-License-Identifier: Apache-2.0
"""Co-training: which rows are trained, what a step does with them, when it stops, what a resumed run knows."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from embedrl_verl.config.schema import EmbedderTrainConfig
from embedrl_verl.data.identity import ContentId
from embedrl_verl.embedder.info_nce import contrastive_loss
from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer.cotrain import (
    EmbedderTraining,
    chosen_rows,
    layout_of,
    refuse_trained_checkpoint,
)
from embedrl_verl.trainer.reward_stage import Row, ScoredRows, Vectors

TCOT = parse_tcot("<thinking>a</thinking>")
D = 6


def row(pair: int, side: int, session: int, content: tuple[int, int] | None = None) -> Row:
    key = f"u{pair}{side}_{session}_0"
    ids = ContentId(*(content or (pair, pair)))
    return Row(key, f"p{pair}", side, session, ids, "", "s", TCOT, 0, 0, 0, None, 4)


ROWS = [row(pair, side, session) for pair in (0, 1, 2) for side in (0, 1) for session in (0, 1)]
SCORES = torch.tensor(
    [0.1, 0.9, 0.5, 0.5, float("nan"), 0.2, 0.7, float("nan"), -1.0, -2.0, float("nan"), float("nan")]
)


def scored(rows=ROWS, failures=None, seed: int = 0) -> ScoredRows:
    vectors = torch.nn.functional.normalize(
        torch.randn(len(rows), D, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    vectors[list(failures or {})] = float("nan")
    return ScoredRows(list(rows), None, Vectors(vectors, None, dict(failures or {})), {"score": SCORES[: len(rows)]})


class _FakeClient:
    """Keeps what it is asked to train; the averaged weights' vectors are those of another seed."""

    def __init__(self):
        self.trained, self.embedded, self.folders = [], [], []

    def train_rows(self, keys, gradients, partition_id):
        self.trained.append((list(keys), gradients))
        return {"grad_norm": 1.0, "lr": 0.1}

    def embed_rows(self, keys, partition_id):
        self.embedded.append(list(keys))
        place = {one.key: i for i, one in enumerate(ROWS)}
        return type("Vectors", (), {"vectors": scored(seed=1).vectors.embeddings[[place[key] for key in keys]]})

    def embed(self, rows, averaged):
        return None

    def save(self, folder, step, keep):
        self.folders.append((folder, step, keep))

    def load(self, folder):
        self.folders.append(folder)


class _FakeProbes(list):
    """Hit@1 from a list, one a call."""

    def hit1(self, embed):
        return self.pop(0)


def training(anchors=(0.5, 0.6, 0.7, 0.4), **settings) -> EmbedderTraining:
    return EmbedderTraining(EmbedderTrainConfig(enable=True, **settings), _FakeClient(), _FakeProbes(anchors))


def test_the_best_rollouts_are_those_with_the_highest_known_scores_first_on_ties():
    assert chosen_rows(ROWS, SCORES, [True] * 12, "best", [0, 1]) == [1, 2, 5, 6, 8, 10]


def test_rows_without_a_vector_are_never_chosen():
    usable = [i not in (1, 10, 11) for i in range(12)]
    assert chosen_rows(ROWS, SCORES, usable, "best", [0, 1]) == [0, 2, 5, 6, 8]
    assert chosen_rows(ROWS, SCORES, usable, "all", [0, 1]) == [0, 2, 3, 4, 5, 6, 7, 8, 9]


def test_random_takes_one_of_each_prompt_by_seed_and_step():
    picks = {step: chosen_rows(ROWS, SCORES, [True] * 12, "random", [7, step]) for step in range(20)}
    assert picks == {step: chosen_rows(ROWS, SCORES, [True] * 12, "random", [7, step]) for step in range(20)}
    assert all([i // 2 for i in pick] == list(range(6)) for pick in picks.values())
    assert len({tuple(pick) for pick in picks.values()}) > 5


def test_the_layout_links_rows_by_pair_not_by_position():
    rows = [ROWS[i] for i in (7, 0, 9, 2, 4)]
    query, target, layout = layout_of(rows)
    assert (query, target) == ([1, 2, 4], [0, 3])
    assert layout.positives().tolist() == [[False, True], [False, False], [True, False]]


@pytest.mark.parametrize("sessions", [1, 2])
def test_rows_of_an_equal_query_are_no_negatives_and_give_no_gradient(sessions):
    contents = [(1, 10), (1, 20), (2, 30)]  # two captions of one photo
    rows = [row(pair, side, s, contents[pair]) for pair in (0, 1, 2) for side in (0, 1) for s in range(sessions)]
    query, target, layout = layout_of(rows)
    of_query, of_target = ([int(rows[i].pair_id[1]) for i in places] for places in (query, target))
    wanted = [[2 in (a, b) and a != b for b in of_target] for a in of_query]
    assert layout.negatives().tolist() == wanted
    one = training(rollouts="all", temperature=0.1)
    batch = scored(rows)
    batch.vectors = Vectors(torch.eye(D)[[int(r.pair_id == "p2") for r in rows]], None, {})
    metrics = one.step(batch, 1)
    assert metrics["embedder/loss"] < 1e-3 and one._client.trained[0][1].abs().max() < 1e-2


@pytest.mark.parametrize("how", ["best", "all"])
def test_a_step_trains_the_chosen_rows_with_the_gradients_of_their_own_vectors(how):
    one = training(rollouts=how, temperature=0.1)
    batch = scored()
    metrics = one.step(batch, 1)
    keys, gradients = one._client.trained[0]
    picked = chosen_rows(ROWS, SCORES, [True] * 12, how, [0, 1])
    assert keys == [ROWS[i].key for i in picked]
    # A small step against each vector's gradient lowers the loss.
    query, target, layout = layout_of([ROWS[i] for i in picked])

    def loss(vectors: torch.Tensor) -> float:
        return float(contrastive_loss(vectors[query], vectors[target], layout, temperature=0.1).loss)

    vectors = batch.vectors.embeddings[picked]
    assert loss(vectors - 1e-3 * gradients) < loss(vectors) - 1e-6
    assert metrics["embedder/loss"] == pytest.approx(loss(vectors), rel=1e-5)
    assert metrics["embedder/grad_norm"] == 1.0 and metrics["embedder/lr"] == 0.1
    assert one._client.embedded == [], "the rewards' forward pass is pass 1"


@pytest.mark.parametrize("options", [{"temperature": 0.1}, {"symmetric": False}, {"matryoshka_dims": (2, 4)}])
def test_the_loss_of_a_step_is_the_one_that_is_set(options):
    picked = chosen_rows(ROWS, SCORES, [True] * 12, "best", [0, 1])
    query, target, layout = layout_of([ROWS[i] for i in picked])
    vectors = scored().vectors.embeddings[picked]
    wanted = float(contrastive_loss(vectors[query], vectors[target], layout, **{"temperature": 0.02, **options}).loss)
    assert training(rollouts="best", **options).step(scored(), 1)["embedder/loss"] == pytest.approx(wanted, rel=1e-5)
    assert training(rollouts="best").step(scored(), 1)["embedder/loss"] != pytest.approx(wanted, rel=1e-3)


def test_with_an_average_pass_1_is_done_anew_with_the_trained_weights():
    one = training(ema_decay=0.9, temperature=0.1)
    metrics = one.step(scored(), 1)
    assert len(one._client.embedded) == 1
    assert metrics["embedder/loss"] != pytest.approx(training(temperature=0.1).step(scored(), 1)["embedder/loss"])


def test_rows_that_only_the_trained_weights_cannot_embed_are_left_out():
    one = training(ema_decay=0.9, temperature=0.1)
    whole = one._client.embed_rows

    def broken(keys, partition_id):
        found = whole(keys, partition_id)
        found.vectors[1] = float("nan")
        return found

    one._client.embed_rows = broken
    metrics = one.step(scored(), 1)
    keys, gradients = one._client.trained[0]
    assert len(keys) == 5 and gradients.isfinite().all() and metrics["embedder/loss"] > 0


@pytest.mark.parametrize("contents", [[(5, 5), (5, 5)], [(5, 1), (5, 2)], [(1, 5), (2, 5)]])
def test_a_batch_of_one_query_or_one_target_is_skipped_and_counted(caplog, contents):
    rows = [row(pair, side, 0, contents[pair]) for pair in (0, 1) for side in (0, 1)]
    one = training()
    with caplog.at_level(logging.WARNING):
        metrics = one.step(scored(rows), 3)
    assert metrics["embedder/skipped_updates"] == 1 and one.state.updates == 0 and not one._client.trained
    assert "step 3: the Embedder was not trained: a contrastive batch needs at least two pairs" in caplog.text


def test_it_stops_for_good_when_the_anchors_fall_and_says_why(caplog):
    one = training(anchors=(0.5, 0.6, 0.39), max_anchor_drop=0.1)
    with caplog.at_level(logging.WARNING):
        assert one.step(scored(), 1)["embedder/anchor_hit@1"] == 0.6
        assert one.is_due(2)
        one.step(scored(), 2)
    assert not one.is_due(3) and one.state.stopped_at == 2
    assert "stops at step 2: Hit@1 of its 0 probe pairs fell from 0.500 to 0.390" in caplog.text


def test_it_trains_in_every_so_many_th_step():
    assert [step for step in range(1, 10) if training(every=3).is_due(step)] == [3, 6, 9]


def test_a_resumed_run_knows_baseline_and_stop(tmp_path):
    one = training(anchors=(0.5, 0.2))
    one.step(scored(), 1)
    one.save(str(tmp_path), 1, 2)
    assert one._client.folders == [(f"{tmp_path}/embedder", 1, 2)]
    other = training()
    other.load(str(tmp_path))
    assert other.state == one.state and other.state.stopped_at == 1 and other.state.baseline == 0.5
    assert json.loads((tmp_path / "cotraining.json").read_text())["updates"] == 1


def test_frozen_and_trained_runs_do_not_go_on_from_each_other(tmp_path):
    with pytest.raises(ConfigError, match="begun with a frozen Embedder"):
        training().load(str(tmp_path))
    refuse_trained_checkpoint(str(tmp_path))
    training().save(str(tmp_path), 1, None)
    with pytest.raises(ConfigError, match="was co-trained; resume with embedrl.embedder.train.enable=True"):
        refuse_trained_checkpoint(str(tmp_path))
