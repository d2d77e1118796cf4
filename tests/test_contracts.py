# SPDX-License-Identifier: Apache-2.0
"""What users write against (DESIGN, section 4): names, arguments and defaults that no rewrite may change."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    *("build_data_tiny_cpu", "compare_tiny_cpu", "run_egrl_qwen2_5vl", "run_egrl_qwen2_5vl_megatron"),
    *("run_egrl_qwen2vl", "run_egrl_qwen3vl", "run_egrl_qwen3vl_megatron", "run_egrl_tiny_cpu"),
    *("run_embedder_contrastive", "run_embedder_tiny_cpu"),
}


def test_a_pair_record_has_its_fields():
    from embedrl_verl.data.schema import Item, PairRecord, Video

    video = Video(frames=("a.png", "b.png"), fps=2.0)
    query = Item(text="a dog", images=("c.png",), kind="page", tcot="", instruction="")
    target = Item(video=video, tcot="<thinking>")
    names = {"pair_id": "p", "data_source": "s", "instruction": "Find it."}
    pair = PairRecord(**names, query=query, target=target, query_id="q", target_id="t")
    assert pair.negatives == () and Video(path="clip.mp4").frames == ()


def test_tcots_are_parsed_scored_and_their_boxes_become_pixels():
    from embedrl_verl.tcot import TCoT, boxes_to_pixels, format_reward, parse_tcot

    text = '<thinking>{"bbox_2d": [[0, 0, 500, 500]]}</thinking><rethink>yes</rethink><answer>a</answer>'
    tcot = parse_tcot(text, num_frames=None, num_images=1)
    assert isinstance(tcot, TCoT) and format_reward(tcot, "bbox_2d") == format_reward(tcot) == 1.0
    assert format_reward(parse_tcot("\0<thinking>{"), required=None) == 0.0
    assert callable(boxes_to_pixels)


def test_rewards_have_the_paper_as_default():
    from embedrl_verl.rewards import outcome_reward, total_reward

    def defaults(function):
        return {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}

    masks = {"col_content": None, "col_valid": None, "row_valid": None}
    assert defaults(outcome_reward) == {**masks, "temperature": 0.5, "accuracy": "share"}
    assert defaults(total_reward) == {"alpha": 0.05, "beta": 0.8, "gamma": 0.2}
    pairs = torch.arange(2)
    assert outcome_reward(torch.eye(2), pairs, pairs).accuracy.tolist() == [1.0, 1.0]


def test_every_ready_made_reward_is_compute_score_of_a_batch_with_a_score():
    from embedrl_verl.rewards import RewardBatch
    from embedrl_verl.rewards.functions import NEEDS
    from embedrl_verl.rewards.load import load_reward_function
    from embedrl_verl.tcot import parse_tcot

    async def judge(batch):
        return torch.ones(len(batch))

    batch = RewardBatch.build(
        side=torch.tensor([0, 1, 0, 1]),
        pair=torch.tensor([0, 0, 1, 1]),
        rollout=torch.zeros(4, dtype=torch.int64),
        content=torch.tensor([0, 0, 1, 1]),
        tcots=[parse_tcot("")] * 4,
        required=["text_keywords"] * 4,
        embeddings=torch.eye(2)[[0, 0, 1, 1]],
        lengths=torch.full((4,), 10),
        raw_embeddings=torch.eye(2)[[0, 0, 1, 1]],
        judge=judge,
    )
    for name in NEEDS:
        function, _ = load_reward_function(str(ROOT / "reward" / f"{name}.py"))
        assert function(batch)["score"].shape == (4,), name


def test_the_embedder_has_its_names():
    from embedrl_verl.embedder import Embedder, build_messages, info_nce

    assert callable(info_nce) and callable(build_messages)
    assert callable(Embedder.from_pretrained) and callable(Embedder.embed)


def test_metrics_of_evaluation():
    from embedrl_verl.evaluation.metrics import hit_at_k, mrr_at_k, ndcg_at_k, recall_at_k

    similarity, relevant = torch.eye(3), torch.eye(3, dtype=torch.bool)
    for metric in (hit_at_k, recall_at_k, ndcg_at_k, mrr_at_k):
        assert float(metric(similarity, relevant, 2)) == pytest.approx(1.0)


def test_trainer_modes_agent_loop_and_reward_manager_are_registered():
    from verl.experimental.reward_loop.reward_manager.registry import get_reward_manager_cls
    from verl.trainer.ppo.v1 import get_trainer_cls

    for mode in ("egrl_sync", "egrl_colocate_async", "egrl_separate_async"):
        assert get_trainer_cls(mode).__module__.startswith("embedrl_verl.trainer.")
    manager = get_reward_manager_cls("embedder_guided")
    assert asyncio.iscoroutinefunction(manager.run_single)
    (loop,) = yaml.safe_load((ROOT / "embedrl_verl/config/agent_loops.yaml").read_text())
    assert loop["name"] == "tcot"


def test_recipes_keep_their_names():
    assert {path.stem for path in (ROOT / "recipes").glob("*_*.sh")} == RECIPES
