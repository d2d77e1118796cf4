# SPDX-License-Identifier: Apache-2.0
"""The records beside EG-RL's checkpoints: the model card's command reads them, for the right model."""

from __future__ import annotations

from omegaconf import OmegaConf

from embedrl_verl.config import parse_embedrl_section
from embedrl_verl.export.record import read_record
from embedrl_verl.trainer.training_record import (
    sources_of,
    write_embedder_record_for_export,
    write_reasoner_record,
)

RUN = OmegaConf.create(
    {
        "data": {"train_batch_size": 16, "max_prompt_length": 256, "max_response_length": 96, "seed": 3},
        "actor_rollout_ref": {
            "model": {"path": "some/reasoner"},
            "actor": {"optim": {"lr": 1e-5}, "kl_loss_coef": 0.01, "clip_ratio": 0.2},
            "rollout": {"n": 8, "temperature": 1.0},
        },
        "reward": {"custom_reward_function": {"path": "reward/no_judge.py"}},
    }
)


def test_each_models_export_finds_its_own_record(tmp_path):
    embedrl = parse_embedrl_section(
        {"embedder": {"path": "some/embedder", "train": {"enable": True, "lr": 1e-4, "matryoshka_dims": [8]}}}
    )
    data = sources_of(["b", "a", "b"])
    assert data == [{"source": "a", "pairs": 1}, {"source": "b", "pairs": 2}]
    write_reasoner_record(str(tmp_path), 20, RUN, embedrl, data, {"hit@1 (all)": 0.5})
    write_embedder_record_for_export(str(tmp_path / "embedder"), 20, embedrl, data, {"hit@1 (anchors)": 0.9})
    (tmp_path / "actor").mkdir()
    reasoner, embedder = read_record(tmp_path / "actor"), read_record(tmp_path / "embedder")
    assert (reasoner.stage, reasoner.step, reasoner.base_model) == ("egrl", 20, "some/reasoner")
    assert reasoner.settings["pairs_per_step"] == 8 and reasoner.settings["reward_function"] == "no_judge.py"
    assert reasoner.scores == {"hit@1 (all)": 0.5}
    assert (embedder.stage, embedder.base_model) == ("embedder", "some/embedder")
    assert embedder.settings["lr"] == 1e-4 and embedder.data == (("a", 1), ("b", 2))
    assert embedder.scores == {"hit@1 (anchors)": 0.9}
