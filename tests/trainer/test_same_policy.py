# SPDX-License-Identifier: Apache-2.0
"""Rollouts that are not the actor's own are warned of, and stop a synchronous run."""

from __future__ import annotations

import logging

import pytest

from embedrl_verl.errors import ConfigError, EmbedRLError
from embedrl_verl.plan import compose
from embedrl_verl.trainer.checks import check_run_config
from embedrl_verl.trainer.egrl import EGRLTrainerSync
from embedrl_verl.trainer.modes_async import EGRLTrainerColocateAsync
from embedrl_verl.trainer.same_policy import CORRELATION, check_same_policy

REQUIRED = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl"]
LORA = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16"]


@pytest.mark.parametrize(
    ("value", "synchronous", "warned", "stopped"),
    [
        (1.0, True, False, False),
        (0.99, True, False, False),
        (0.98, True, True, False),
        (0.9, True, True, False),
        (0.745, True, False, True),
        (-0.2, True, False, True),
        (0.745, False, True, False),
        (float("nan"), True, False, False),
        (None, True, False, False),
    ],
)
def test_a_correlation_is_warned_of_or_stops_the_run(value, synchronous, warned, stopped, caplog):
    metrics = {} if value is None else {CORRELATION: value}
    caplog.set_level(logging.WARNING)
    if stopped:
        with pytest.raises(EmbedRLError, match="min_probs_correlation=0.9 the run stops"):
            check_same_policy(metrics, 7, least=0.9, synchronous=synchronous)
    else:
        check_same_policy(metrics, 7, least=0.9, synchronous=synchronous)
    assert ("step 7" in caplog.text) is warned


@pytest.mark.parametrize(("trainer", "stops"), [(EGRLTrainerSync, True), (EGRLTrainerColocateAsync, False)])
def test_the_trainer_looks_after_verls_log_probs(trainer, stops, monkeypatch):
    config = compose(REQUIRED)

    def log_probs(self, batch, metrics):
        metrics[CORRELATION] = 0.44
        return batch

    parent = next(base for base in trainer.__mro__ if base.__module__.startswith("verl."))
    monkeypatch.setattr(parent, "_compute_old_log_prob", log_probs, raising=False)
    made = object.__new__(trainer)
    from embedrl_verl.config import load_embedrl_config

    made.embedrl, made.global_steps = load_embedrl_config(config), 3
    if stops:
        with pytest.raises(EmbedRLError, match="step 3"):
            made._compute_old_log_prob("batch", metrics={})
    else:
        assert made._compute_old_log_prob("batch", metrics={}) == "batch"


def test_an_adapter_leaves_out_the_vision_part_by_default_and_must():
    check_run_config(compose([*REQUIRED, *LORA]))
    key = "actor_rollout_ref.model.exclude_modules"
    check_run_config(compose([*REQUIRED, *LORA, f"{key}='.*(visual|lm_head).*'"]))
    for wrong in ("null", "visual", "'.*visual.blocks.*'", "'.*mlp.*'", "[visual]"):
        with pytest.raises(ConfigError, match="an adapter must leave out the vision part"):
            check_run_config(compose([*REQUIRED, *LORA, f"{key}={wrong}"]))
    check_run_config(compose([*REQUIRED, f"{key}=null"]))  # without an adapter it says nothing


@pytest.mark.parametrize("value", ["1", "-0.1", "2"])
def test_the_limit_is_a_share(value):
    with pytest.raises(ConfigError, match="rollout.min_probs_correlation must be at least 0 and below 1"):
        check_run_config(compose([*REQUIRED, f"embedrl.rollout.min_probs_correlation={value}"]))
