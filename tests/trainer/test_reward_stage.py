# SPDX-License-Identifier: Apache-2.0
"""The reward stage counts failures and never turns one into a number."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from verl.utils import tensordict_utils as tu

from embedrl_verl.data.identity import ContentId
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.dump import read_reward_dump
from embedrl_verl.rewards.functions.no_judge import compute_score as no_judge
from embedrl_verl.tcot import parse_tcot
from embedrl_verl.trainer import reward_stage
from embedrl_verl.trainer.reward_stage import (
    ROW_INFO,
    Row,
    ScoredRows,
    check_scores,
    column,
    embed_rows,
    raw_key,
    read_rows,
    refuse_failures,
    reward_batch,
    write_scores,
    write_validation_scores,
)

WELL_FORMED = '<thinking>It is {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'


def _rows(pairs=2, rollouts=2, failures=()):
    rows = []
    for pair in range(pairs):
        for side in (0, 1):
            for session in range(rollouts):
                key = f"uid{pair}{side}_{session}_0"
                failure = "image missing" if key in failures else None
                tcot = parse_tcot(WELL_FORMED.replace("Yes", f"Yes {session}"))
                ids = ContentId(pair, pair)
                rows.append(Row(key, f"p{pair}", side, session, ids, "text_keywords", "s", tcot, 0, 0, 0, failure, 5))
    return rows


def score_rows(rows, embed, score_batch, *, max_failed_share=0.5, expected_rows=8, judge=None, raw=False):
    """The stage as the trainer runs it."""
    vectors = embed_rows(rows, embed, raw=raw)
    refuse_failures(rows, vectors.failures, max_failed_share, expected_rows)
    batch = reward_batch(rows, vectors, judge)
    scored = ScoredRows(rows, batch, vectors, score_batch(batch))
    scored.measure(expected_rows)
    return scored


class _FakeEmbedder:
    """Vectors by pair; rows in `bad` fail."""

    def __init__(self, bad=()):
        self.bad = bad
        self.asked = []

    def __call__(self, keys, partition_id):
        assert partition_id == "embed"
        self.asked = list(keys)
        vectors = torch.stack([torch.eye(3)[int(key[3])] for key in keys])
        failed = {i: "not finite" for i, key in enumerate(keys) if key in self.bad}
        vectors[list(failed)] = float("nan")
        return vectors, failed


def _margin(batch: RewardBatch):
    """Mean similarity to all valid rows of the other side; NaN for a row without embedding."""
    score = torch.full((batch.valid.numel(),), float("nan"))
    for rows, similarity in ((batch.query_rows, batch.similarity), (batch.target_rows, batch.similarity.T)):
        score[rows] = similarity.nanmean(dim=1)
    score[~batch.valid] = float("nan")
    return {"score": score}


def test_a_failed_row_is_unknown_and_is_not_embedded():
    rows = _rows(failures=("uid00_1_0",))
    embedder = _FakeEmbedder()
    scored = score_rows(rows, embedder, _margin, max_failed_share=0.5, expected_rows=len(rows))
    assert "uid00_1_0" not in embedder.asked
    unknown = [row.key for row, value in zip(rows, scored.parts["score"], strict=True) if torch.isnan(value)]
    assert unknown == ["uid00_1_0"]
    assert scored.vectors.failures == {1: "image missing"}
    assert scored.describe(1)["reward"] == {"score": None}
    assert scored.describe(0)["side"] == "query"


def test_equal_rollouts_of_a_prompt_are_embedded_once_and_have_one_vector_and_one_fate():
    """The Embedder's vectors of equal rows differ here from call to call, as those of other micro-batches would."""
    rows = _rows(pairs=2, rollouts=3)
    rows[1] = replace(rows[1], tcot=rows[0].tcot)
    rows[9] = replace(rows[9], tcot=rows[10].tcot)  # the second and the third of a prompt
    noise = torch.Generator().manual_seed(0)

    def embed(keys, partition_id):
        vectors, failed = _FakeEmbedder(bad=(rows[9].key,))(keys, partition_id)
        return vectors + 1e-3 * torch.randn(vectors.shape, generator=noise), failed

    scored = score_rows(rows, embed, _margin, max_failed_share=0.5, expected_rows=12)
    same = [scored.vectors.embeddings[i].equal(scored.vectors.embeddings[0]) for i in range(3)]
    assert same == [True, True, False]
    assert sorted(scored.vectors.failures) == [9, 10]
    assert scored.vectors.embeddings[[9, 10]].isnan().all() and not scored.vectors.embeddings[11].isnan().any()


def test_equal_words_under_another_prompt_are_another_row():
    rows = _rows(pairs=2, rollouts=1)
    embedder = _FakeEmbedder()
    score_rows(rows, embedder, _margin, max_failed_share=0.0, expected_rows=4)
    assert embedder.asked == [row.key for row in rows]


def test_rows_that_fail_in_the_embedder_are_unknown_too():
    rows = _rows()
    scored = score_rows(rows, _FakeEmbedder(bad=("uid11_0_0",)), _margin, max_failed_share=0.5, expected_rows=8)
    assert list(scored.vectors.failures.values()) == ["not finite"]
    assert int(torch.isnan(scored.parts["score"]).sum()) == 1


def test_too_many_failures_stop_the_step_and_name_their_causes():
    rows = _rows(failures=("uid00_1_0", "uid00_0_0"))
    with pytest.raises(EmbedderError) as caught:
        score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.3, expected_rows=9)  # 2 of 9 would do
    message = str(caught.value)
    assert "3 of 9 rows" in message
    assert "2 x image missing" in message
    assert "1 x the rollout failed" in message
    assert "max_failed_share=0.3" in message


def test_rollouts_that_never_came_are_counted():
    scored = score_rows(_rows(), _FakeEmbedder(), _margin, expected_rows=10)
    assert scored.metrics["embedrl/rollouts_missing"] == 2 and scored.metrics["embedrl/rows"] == 8
    assert score_rows(_rows(), _FakeEmbedder(), _margin).metrics["embedrl/rollouts_missing"] == 0


def test_raw_inputs_are_embedded_in_the_same_call_and_shared_by_a_prompts_rollouts(monkeypatch):
    """A prompt whose raw input is missing has no raw similarity; nothing else changes."""
    rows = _rows()
    there = {raw_key(uid): {} for uid in ("uid00", "uid01", "uid11")}
    own = {raw_key("uid00"): [1.0, 0.0, 0.0], raw_key("uid01"): [0.0, 0.6, 0.8], raw_key("uid11"): [0.6, 0.8, 0.0]}
    monkeypatch.setattr(reward_stage.tq, "kv_list", lambda partition: {partition: there})
    embedder, calls = _FakeEmbedder(), []

    def embed(keys, partition_id):
        calls.append(keys)
        vectors, failed = embedder(keys, partition_id)
        return torch.stack(
            [torch.tensor(own.get(key, one.tolist())) for key, one in zip(keys, vectors, strict=True)]
        ), failed

    scored = score_rows(rows, embed, _margin, max_failed_share=0.0, expected_rows=8, raw=True)
    plain = score_rows(rows, embedder, _margin, max_failed_share=0.0, expected_rows=8)
    assert len(calls) == 1 and len(calls[0]) == 8 + 3
    assert plain.batch.raw_similarity is None
    assert scored.parts["score"].equal(plain.parts["score"])
    raw = scored.batch.raw_similarity
    missing = torch.tensor([row.uid == "uid10" for row in rows])
    assert (
        raw[missing[scored.batch.query_rows]].isnan().all() and not raw[~missing[scored.batch.query_rows]].isnan().any()
    )
    assert raw[~missing[scored.batch.query_rows]].unique(dim=0).tolist() == [pytest.approx([0.0, 0.0, 0.6, 0.6])]
    assert scored.metrics["embedrl/rows_without_raw"] == 2


def test_the_judge_is_asked_about_the_rows_as_they_stand():
    rows, seen = _rows(), []

    async def judge(batch):
        seen.append(batch)
        return torch.arange(8) % 2

    def paper(batch):
        return {"score": batch.process(), "process": batch.process()}

    scored = score_rows(rows, _FakeEmbedder(), paper, max_failed_share=0.0, expected_rows=8, judge=judge)
    assert scored.parts["process"].tolist() == [0.0, 1.0] * 4
    assert seen[0].lengths.tolist() == [5] * 8 and seen[0].rollout.tolist() == [row.session for row in rows]


def test_a_dump_holds_the_rows_and_gives_the_same_rewards_again(tmp_path):
    rows = _rows(failures=("uid00_1_0",))
    scored = score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.5, expected_rows=8)
    kwargs = {"weight": "${base}", "of": {"k": [1, None]}}
    config = OmegaConf.create(
        {"base": 0.2, "function": {"path": "mine.py", "name": "compute_score", "reward_kwargs": kwargs}}
    )
    scored.write_dump(tmp_path / "3.rewards.safetensors", config.function)
    dump = read_reward_dump(tmp_path / "3.rewards.safetensors")
    assert [row["pair_id"] for row in dump.rows] == [row.pair_id for row in rows]
    assert dump.function == "mine.py:compute_score" and dump.kwargs == {"weight": 0.2, "of": {"k": [1, None]}}
    assert dump.batch.tcots == scored.batch.tcots
    again = _margin(dump.batch)["score"]
    assert again.nan_to_num(9).equal(scored.parts["score"].nan_to_num(9))


def test_a_batch_without_any_score_is_refused_and_one_score_is_enough():
    rows = _rows(failures=("uid00_1_0",))
    scored = score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.5, expected_rows=len(rows))
    check_scores(scored, "mine.py:compute_score")
    scored.parts["score"][1:] = float("nan")
    check_scores(scored, "mine.py:compute_score")
    scored.parts["score"][:] = float("nan")
    with pytest.raises(ConfigError, match=r"mine.py:compute_score must give rows a score; all 8 of the batch's rows"):
        check_scores(scored, "mine.py:compute_score")
    scored.metrics["embedrl/rows_without_negatives"] = 7.0  # of all that have an embedding: not the function's fault
    with pytest.raises(
        EmbedderError, match=r"none of 8 rows .* \(1 have no .* 2 different queries and 2 different targets\)"
    ):
        check_scores(scored, "mine.py:compute_score")


@pytest.mark.parametrize(("content", "alone"), [([(5, 1), (5, 2)], 8), ([(1, 7), (2, 7)], 8), ([(1, 1), (2, 2)], 0)])
def test_a_batch_in_which_nobody_has_a_negative_is_refused(content, alone):
    """Its outcome would be the bare similarity, which is highest where all vectors are the same."""
    rows = [replace(row, content=ContentId(*content[int(row.pair_id[-1])])) for row in _rows(pairs=2, rollouts=2)]
    scored = score_rows(rows, _FakeEmbedder(), no_judge, max_failed_share=0.0, expected_rows=8)
    assert scored.metrics["embedrl/rows_without_negatives"] == alone
    if alone:
        with pytest.raises(EmbedderError, match="a score that depends on a negative.*differ in both"):
            check_scores(scored, "no_judge.py:compute_score")
        del scored.parts["outcome"]  # a reward of the form needs no negatives
    check_scores(scored, "no_judge.py:compute_score")


@pytest.mark.parametrize(
    ("known", "groups", "left_out"), [(2, True, 2), (1, True, None), (1, False, 3), (0, False, None)]
)
def test_a_batch_with_nothing_to_compare_is_refused(known, groups, left_out, monkeypatch):
    """`known` rows of one prompt have a score; with one rollout a prompt nothing is compared."""
    written = []
    monkeypatch.setattr(reward_stage.tq, "kv_batch_put", lambda **given: written.append(given))
    rows = _rows(pairs=1, rollouts=2)
    scored = score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.0, expected_rows=4)
    scored.parts["score"] = torch.tensor([float(i) if i < known else float("nan") for i in range(4)])
    if left_out is None:
        with pytest.raises(EmbedderError, match=f"{known} of 4 rows have one"):
            write_scores(scored, groups=groups)
        return
    write_scores(scored, groups=groups)
    assert scored.metrics["embedrl/rows_without_advantage"] == left_out == len(written[-1]["keys"])


def test_rows_carry_both_ids_into_the_batch_and_equal_queries_are_no_negatives():
    ids = {"p0": ContentId(1, 10), "p1": ContentId(1, 20), "p2": ContentId(2, 30)}
    rows = [replace(row, content=ids[row.pair_id]) for row in _rows(pairs=3)]
    scored = score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.0, expected_rows=len(rows))
    assert scored.batch.content.tolist() == [list(ids[row.pair_id]) for row in rows]
    assert scored.metrics["embedrl/false_negatives/mean"] == pytest.approx(2 * 2 / 3)


def test_a_validation_row_is_told_its_own_numbers_and_none_that_is_unknown(monkeypatch):
    rows, written = _rows(pairs=1, rollouts=2), []
    extras = tu.get_tensordict({"extra_fields": [{"mine": i} for i in range(4)]})
    monkeypatch.setattr(reward_stage.tq, "kv_batch_get", lambda **given: extras)
    monkeypatch.setattr(reward_stage.tq, "kv_batch_put", lambda **given: written.append(given))
    scored = score_rows(rows, _FakeEmbedder(), _margin, max_failed_share=0.0, expected_rows=4)
    nan = float("nan")
    scored.parts = {"score": torch.tensor([0.0, 0.25, nan, 0.75]), "format": torch.tensor([1.0, 0.0, 1.0, nan])}
    write_validation_scores(scored, "val")
    (put,) = written
    assert put["keys"] == [row.key for row in rows]
    found = column(put["fields"], "extra_fields")
    assert [one["reward_extra_info"] for one in found] == [
        {"score": 0.0, "format": 1.0},
        {"score": 0.25, "format": 0.0},
        {"format": 1.0},
        {"score": 0.75},
    ]
    assert [one["mine"] for one in found] == [0, 1, 2, 3]


def test_the_two_ids_of_a_row_are_read_from_their_own_columns(monkeypatch):
    info = {
        "tcot": parse_tcot(WELL_FORMED).to_plain(),
        "num_images": 0,
        "num_frames": 0,
        "evidence": 0,
        "failure": None,
    }
    stored = tu.get_tensordict(
        {
            "responses": torch.nested.as_nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
            "extra_fields": [{ROW_INFO: info}] * 2,
            "embedrl_pair_id": ["p0", "p0"],
            "embedrl_side": ["query", "target"],
            "embedrl_query_content": [2**62, 2**62],
            "embedrl_target_content": [-7, -7],
            "embedrl_required": ["text_keywords"] * 2,
            "data_source": ["s", "s"],
        }
    )
    monkeypatch.setattr(reward_stage.tq, "kv_batch_get", lambda keys, partition_id, select_fields: stored)
    rows = read_rows(["b_0_0", "a_0_0"], "train")
    # Sorted by who the row is, not by verl's random uid.
    assert [(row.key, row.side, row.response_tokens) for row in rows] == [("b_0_0", 0, 3), ("a_0_0", 1, 2)]
    assert {row.content for row in rows} == {ContentId(query=2**62, target=-7)}
    assert rows[0].tcot == parse_tcot(WELL_FORMED)
