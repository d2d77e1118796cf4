# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.train` refuses what cannot work before it starts anything: one message, an exit code."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial

import pytest

import embedrl_verl.train
from embedrl_verl.platforms import claims, plugin
from tests.e2e import harness


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    harness.prepare(folder, pairs=4)
    return folder


@pytest.fixture
def refuse(inputs, tmp_path, monkeypatch, capsys):
    """Call `main` with overrides on top of a run that would work; returns (exit code, stderr)."""
    import verl.trainer.main_ppo

    def never(*_args, **_kwargs):
        pytest.fail("the run was started")

    monkeypatch.setattr(verl.trainer.main_ppo, "run_ppo", never)

    def call(*extra: str) -> tuple[int, str]:
        arguments = [*harness.overrides(inputs, tmp_path, steps=1), *extra]
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as stop:
            embedrl_verl.train.main()
        return int(stop.value.code), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["data.train_batch_siz=8"], 2, ["train_batch_siz"]),  # hydra
        (["+embedrl.rewrd=1"], 2, ["embedrl", "rewrd"]),  # the schema
        (["data.train_batch_size=7"], 2, ["data.train_batch_size", "even", "7"]),  # the rules
        (["data.train_files=none.parquet"], 2, ["data.train_files", "none.parquet"]),
        (["reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.paper"], 2, ["judge", "no_judge"]),
        (
            [f"actor_rollout_ref.actor.{one}" for one in ("use_dynamic_bsz=False", "ppo_micro_batch_size=1")],
            2,
            ["verl's validator refuses"],
        ),
        (["data.train_batch_size=x"], 2, ["data.train_batch_size must be a whole number; got x"]),
        (["actor_rollout_ref.actor.optim.lr=abc"], 2, ["optim.lr must be a number; got abc"]),
        (
            ["data.train_batch_size=16"],
            2,
            ["data.train_files must hold 8 pairs of each data source", "got digits_i2i 4"],
        ),
        (["actor_rollout_ref.model.path=./gone"], 2, ["no such folder: ./gone (name a folder, or a hub id"]),
        (["actor_rollout_ref.rollout.temperature=0"], 2, ["temperature must be positive: greedy rollouts", "got 0"]),
        (
            ["actor_rollout_ref.model.path=tests"],
            2,
            ["must be a folder of a Hugging Face model", "there is no config.json in"],
        ),
        (["embedrl.embedder.path=/gone"], 2, ["no such folder: /gone"]),
        (["trainer.logger=[file,tensorbord]"], 2, ["trainer.logger (LOGGER", "tensorboard, ", "got tensorbord"]),
        (["ray_kwargs.ray_init.num_cpus=2"], 4, ["needs 5 CPUs", "has 2 CPUs", "num_cpus=5"]),
        (["trainer.v1.trainer_mode=egrl_snyc"], 4, ["egrl_snyc", "plugin", "embedrl doctor"]),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(refuse, extra, code, words):
    found, message = refuse(*extra)
    assert found == code, message
    for word in words:
        assert word in message
    assert "Traceback" not in message and "trainer.total_epochs=100" not in message, "all overrides are printed"


def test_a_second_run_on_the_machine_is_refused_before_ray_starts(refuse, tmp_path, monkeypatch):
    here = partial(claims.claim_weight_sockets, folder=tmp_path, wait_s=0)
    monkeypatch.setattr(claims, "claim_weight_sockets", here)
    with here(claims.FIRST_JOB):
        code, message = refuse()
    assert code == 4 and "another run on this machine" in message and "a container" in message


def test_the_process_that_starts_a_run_does_not_import_the_trainers(monkeypatch):
    """They are the trainer process's, and take many seconds."""
    import verl

    assert verl.__version__
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.v1.trainer_base", None)
    for mode in plugin.TRAINER_MODES:
        assert embedrl_verl.train._is_registered(mode)
    with pytest.raises(ImportError):
        embedrl_verl.train._is_registered("sync")


def test_an_embedder_without_its_token_is_refused(refuse, inputs, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(inputs / "embedder", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            file.write_text(file.read_text().replace("<emb>", "<other>"))
    assert json.loads((folder / "config.json").read_text())["architectures"]
    code, message = refuse(f"embedrl.embedder.path={folder}", "embedrl.embedder.profile=embed_rl")
    assert code == 4
    assert "<emb>" in message
