# SPDX-License-Identifier: Apache-2.0
"""Rollouts that are not the actor's own are warned of, and stop a synchronous run."""

from __future__ import annotations

import logging

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.errors import EmbedRLError
from embedrl_verl.trainer.egrl import CORRELATION, EGRLTrainerSync, PolicyWatch
from embedrl_verl.trainer.modes_async import EGRLTrainerColocateAsync

REQUIRED = ["embedrl.embedder.path=some/embedder", "data.embedrl.family=qwen2_vl"]


@pytest.mark.parametrize(
    ("values", "synchronous", "warned", "stopped"),
    [
        ([1.0, 1.0], True, [], False),
        ([0.99], True, [], False),
        ([0.98, 0.9, 0.9], True, [0, 1, 2], False),
        ([0.745], True, [0], False),
        ([0.745, 0.95, 0.745], True, [0, 1, 2], False),
        ([1.0, 0.745, 0.44], True, [1], True),
        ([-0.2, -0.2], True, [0], True),
        ([0.745, 0.745], False, [0, 1], False),
        ([float("nan"), 0.5, float("nan"), 0.5], True, [1], True),
        ([None, None, 0.5], True, [2], False),
    ],
)
def test_a_low_correlation_is_warned_of_and_two_in_a_row_stop_the_run(values, synchronous, warned, stopped, caplog):
    caplog.set_level(logging.WARNING)
    watch, ended = PolicyWatch(0.9, synchronous=synchronous), False
    for step, value in enumerate(values):
        metrics = {} if value is None else {CORRELATION: value}
        if stopped and step == len(values) - 1:
            with pytest.raises(EmbedRLError, match=r"min_probs_correlation=0.9 for two steps.*rollout.top_k"):
                watch.check(metrics, step)
            ended = True
        else:
            watch.check(metrics, step)
    assert ended is stopped
    assert [step for step in range(len(values)) if f"step {step}: the prob" in caplog.text] == warned


def test_a_limit_above_the_warning_is_kept_too(caplog):
    watch = PolicyWatch(0.995, synchronous=True)
    watch.check({CORRELATION: 0.991}, 1)
    assert "step 1: the prob" in caplog.text
    with pytest.raises(EmbedRLError, match="step 2"):
        watch.check({CORRELATION: 0.991}, 2)


def test_steps_that_cannot_be_watched_are_said_once(caplog):
    caplog.set_level(logging.WARNING)
    watch = PolicyWatch(0.9, synchronous=True)
    for step in range(3):
        watch.check({CORRELATION: float("nan")} if step else {}, step)
    assert caplog.text.count("is not watched") == 1 and "step 0 has no" in caplog.text


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

    made.global_steps, made.config = 3, config
    made._watch = PolicyWatch(
        load_embedrl_config(config).rollout.min_probs_correlation, synchronous=made.parent_mode == "sync"
    )
    made._compute_old_log_prob("batch", metrics={})
    if stops:
        with pytest.raises(EmbedRLError, match="step 3"):
            made._compute_old_log_prob("batch", metrics={})
    else:
        assert made._compute_old_log_prob("batch", metrics={}) == "batch"
