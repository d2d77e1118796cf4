# SPDX-License-Identifier: Apache-2.0
"""What benchmarks that time whole training runs share: the tiny recipe's models and data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from recipes.tiny_digits.settings import tiny_limits


def overrides(inputs: Path, steps: int, pairs: int, rollouts: int) -> list[str]:
    """`steps` steps of `pairs` pairs on the models and data of a finished run of the recipe, without validation."""
    limits = {name: value for name, value in asdict(tiny_limits("qwen2_vl")).items() if name.endswith("_tokens")}
    return [
        "platform=cpu",
        f"data.train_files={inputs / 'world' / 'train.parquet'}",
        f"data.val_files={inputs / 'world' / 'heldout.parquet'}",
        f"data.train_batch_size={2 * pairs}",
        "data.max_prompt_length=256",
        "data.max_response_length=96",
        "data.seed=0",
        "data.embedrl.prompt_style=compact",
        *(
            f"{section}.{name}={value}"
            for section in ("data.embedrl", "embedrl.embedder")
            for name, value in limits.items()
        ),
        f"actor_rollout_ref.model.path={inputs / 'sft'}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={pairs}",
        f"actor_rollout_ref.rollout.n={rollouts}",
        "actor_rollout_ref.rollout.max_model_len=512",
        f"embedrl.embedder.path={inputs / 'embedder'}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
    ]
