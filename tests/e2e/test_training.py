# SPDX-License-Identifier: Apache-2.0
"""EG-RL through the real engines (verl's trainer, FSDP2, vLLM, Ray, TransferQueue): one long run and its resumption."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from embedrl_verl.cli import main
from embedrl_verl.rewards import total_reward
from recipes.tiny_digits.world import SOURCES
from tests.e2e import scenario
from tests.e2e.rescore import rescore
from tests.e2e.scenario import CONVERSIONS, DIGITS, SAVED, STEPS, TRAINED_EVERY

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROWS = 8 * 4
ALL_STEPS = range(1, STEPS + 1)
PLAIN, KILLED, HANGING, GARBAGE = 1, 2, 3, 4  # what the judge does in which step; in the others it is well


@pytest.fixture(scope="module")
def long(inputs, tmp_path_factory):
    return scenario.play(inputs, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def run(long):
    return long.run


def by_place(rows: list[dict], what: str) -> dict[tuple, object]:
    return {(row["pair_id"], row["side"], row["rollout"]): row[what] for row in rows}


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("step", [PLAIN, KILLED, HANGING])
def test_rewards_depend_on_the_rollouts_and_the_embedder_alone(step, batch_size, long, inputs):
    """The same rollouts rescored in one process, row by row or in a batch, have the rewards that the run gave them
    until the Embedder is trained."""
    rows = long.run.dump("rollouts", step)
    options = {"batch_size": batch_size, "media_root": long.media_root}
    parts = {
        name: rescore(rows, long.files, inputs / "embedder", part=name, **options) for name in ("outcome", "format")
    }
    for name, found in parts.items():
        expected = torch.tensor([row["reward"][name] for row in rows])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert parts["outcome"].std() > 1e-4, "rewards that are all equal would prove nothing"
    process, score = (
        torch.tensor([float("nan") if value is None else value for value in values])
        for values in ([row["reward"]["process"] for row in rows], [row["score"] for row in rows])
    )
    total = total_reward(parts["format"], process, parts["outcome"])
    known = ~score.isnan()
    assert known.any()
    torch.testing.assert_close(score[known], total[known], atol=1e-5, rtol=0)


def test_every_batch_holds_complete_pairs_of_one_source_and_an_epoch_holds_every_source(run):
    sources = Counter()
    for step in ALL_STEPS:
        rows = run.dump("rollouts", step)
        (source,) = {row["data_source"] for row in rows}
        sources[source] += 1
        places = [(row["pair_id"], row["side"], row["rollout"]) for row in rows]
        pairs = {row["pair_id"] for row in rows}
        assert len(pairs) == 4 and len(places) == len(set(places)) == ROWS
        assert set(places) == {(pair, side, g) for pair in pairs for side in ("query", "target") for g in range(4)}
    assert sources == {**dict.fromkeys(CONVERSIONS, 1), **dict.fromkeys(DIGITS, 2)}


def test_no_row_of_any_source_failed_and_no_prompt_was_too_long(run):
    for step in ALL_STEPS:
        assert all(row["failure"] is None for row in run.dump("rollouts", step))
        assert run.metrics[step]["embedrl/failed_rows"] == run.metrics[step]["embedrl/rollouts_missing"] == 0
    assert "are left out" not in run.output


def test_rewards_differ_within_every_source(run):
    outcomes = {}
    for step in ALL_STEPS:
        rows = run.dump("rollouts", step)
        outcomes.setdefault(rows[0]["data_source"], set()).update(round(row["reward"]["outcome"], 6) for row in rows)
    assert all(len(found) > 1 for found in outcomes.values()), outcomes


def test_rollout_and_actor_agree_and_weights_are_synced_after_updates(run):
    """vLLM's log-probs follow the actor's after updates that moved it far from the (initial) reference."""
    for step in ALL_STEPS:
        assert run.metrics[step]["training/rollout_actor_probs_pearson_corr"] >= 0.99
    assert run.metrics[STEPS]["actor/kl_loss"] > 1e-2
    assert run.metrics[STEPS]["training/rollout_probs_diff_mean"] < 1e-3


def test_validation_reports_retrieval_over_the_whole_set(run):
    metrics = run.metrics[0]
    sources = {name.split("/")[1] for name in metrics if name.startswith("val-core/") and name.endswith("/hit@1")}
    assert {"all", *DIGITS} <= sources
    for source in sources:
        assert 0 <= metrics[f"val-core/{source}/hit@1"] <= metrics[f"val-core/{source}/ndcg@5"] <= 1
    assert len(run.dump("validation", 0)) == 2 * 4 * len(SOURCES)


def test_dumps_hold_the_tcot_and_every_reward_part(run):
    for row in run.dump("rollouts", PLAIN):
        assert {"format", "process", "outcome", "score"} <= set(row["reward"])
        assert row["reward"]["score"] == pytest.approx(row["score"])
        assert isinstance(row["problems"], list)


def test_metrics_of_a_step_name_every_part(run):
    metrics = run.metrics[PLAIN]
    for name in ("reward", "format", "process", "outcome", "hit@1", "well_formed", "evidence", "false_negatives"):
        assert f"embedrl/{name}/mean" in metrics
    assert metrics["embedrl/rows"] == ROWS and metrics["timing_s/reward_embed"] > 0


def test_what_a_judge_fails_to_say_is_unknown_and_training_goes_on(run):
    """Killed, hanging, answering garbage: its answers count, the others are no misses."""
    rates = {step: run.metrics[step]["judge/unknown_rate"] for step in ALL_STEPS}
    assert 0 < rates.pop(KILLED) < 1 and 0 < rates.pop(HANGING) < 1 and rates.pop(GARBAGE) == 1
    assert set(rates.values()) == {0}
    for step in ALL_STEPS:
        rows, metrics = run.dump("rollouts", step), run.metrics[step]
        process = [row["reward"]["process"] for row in rows]
        assert process.count(None) == round(metrics["judge/unknown_rate"] * ROWS) == metrics["embedrl/unknown/process"]
        # A row without an answer is unknown beside one that has it; a group without any has the other terms.
        answered = {(row["pair_id"], row["side"]) for row in rows if row["reward"]["process"] is not None}
        for row in rows:
            unknown = row["reward"]["process"] is None and (row["pair_id"], row["side"]) in answered
            assert (row["reward"]["score"] is None) is unknown and (row["score"] is None) is unknown
        assert metrics["actor/grad_norm"] > 0


def test_a_judge_that_always_names_the_first_hits_as_a_blind_one(run):
    metrics = run.metrics[PLAIN]
    assert metrics["judge/picked_at/1"] == 1
    # 8 lists of 4 own and 3 other candidates, one a prompt: the rate of one step, within 4 standard deviations.
    assert metrics["judge/blind_rate/mean"] == pytest.approx(4 / 7)
    assert abs(metrics["judge/hit_rate/mean"] - 4 / 7) < 4 * (4 / 7 * 3 / 7 / 8) ** 0.5


def test_the_embedder_is_co_trained_on_devices_of_its_own_with_an_average_for_the_rewards(inputs, run):
    for step in range(TRAINED_EVERY, STEPS + 1, TRAINED_EVERY):
        metrics = run.metrics[step]
        assert metrics["embedder/updates"] == step // TRAINED_EVERY and metrics["embedder/active"] == 1
        assert metrics["embedder/rows"] == 8 and metrics["embedder/grad_norm"] > 0.01
        assert 0 <= metrics["embedder/anchor_hit@1"] <= 1
    folder = run.folder / "checkpoints" / f"global_step_{SAVED}"
    assert json.loads((folder / "cotraining.json").read_text())["updates"] == SAVED // TRAINED_EVERY
    saved = torch.load(folder / "embedder" / "model_world_size_1_rank_0.pt", weights_only=False)
    average = torch.load(folder / "embedder" / "average_world_size_1_rank_0.pt", weights_only=True)
    before = load_file(inputs / "embedder" / "model.safetensors")
    norm = next(value.to_local() for name, value in saved.items() if name.endswith("language_model.norm.weight"))
    start = next(value for name, value in before.items() if name.endswith("norm.weight") and len(value) == len(norm))
    moved = (norm - start).abs().max()
    assert moved > 1e-4
    closest = min((shadow - norm).abs().max() for shadow in average["shadow"] if shadow.shape == norm.shape)
    assert 0 < closest < moved, "the average lies between the beginning and the weights"


def test_a_checkpoint_can_be_read_by_processes_that_do_not_know_the_runs_attention(run):
    for role in ("actor", "embedder"):
        folder = run.folder / "checkpoints" / f"global_step_{SAVED}" / role / "huggingface"
        assert "attn_implementation" not in json.loads((folder / "config.json").read_text())
        AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


def test_rollouts_of_a_run_are_a_page_without_being_told_where_its_pairs_are(run, capsys):
    assert (
        main(["rollouts", "show", str(run.folder), "--steps", f"1,{STEPS}", "--out", str(run.folder / "page.html")])
        == 0
    )
    assert "page.html: 8 of 8 records" in capsys.readouterr().out


def test_a_checkpoints_card_has_the_scores_of_its_own_step(run):
    record = json.loads((run.folder / "checkpoints" / f"global_step_{SAVED}" / "training.json").read_text())
    assert record["scores"]["hit@1 (all)"] == pytest.approx(run.metrics[SAVED]["val-core/all/hit@1"])
    assert record["settings"]["prompt_style"] == "compact" and record["settings"]["family"] == "qwen2_vl"


def test_a_run_resumes_where_it_stopped_with_the_same_rollouts_and_rewards(long, inputs):
    """The steps after the checkpoint have the pairs, texts, rewards and losses of the unbroken run."""
    run, after = long.run, range(SAVED + 1, STEPS + 1)
    unbroken, before = {step: run.dump("rollouts", step) for step in after}, run.metrics
    resumed = scenario.resume(inputs, long)
    assert resumed.code == 0, resumed.output[-6000:]
    for step in after:
        again = resumed.dump("rollouts", step)
        assert by_place(again, "output") == by_place(unbroken[step], "output")
        assert by_place(again, "score") == pytest.approx(by_place(unbroken[step], "score"), abs=1e-5)
        assert resumed.metrics[step]["actor/pg_loss"] == pytest.approx(before[step]["actor/pg_loss"], abs=1e-5)
    record = run.folder / "checkpoints" / f"global_step_{SAVED}" / "run.json"
    assert json.loads(record.read_text())["embedrl.embedder"]["weights"]
    assert set(resumed.metrics) == set(before)  # the first part of the log is kept
