# SPDX-License-Identifier: Apache-2.0
"""On a cluster that is joined, the run's processes have the paths and variables of the person who started it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms import cluster
from embedrl_verl.platforms.cluster import OnThisNode, check_home, join_cluster, make_paths_absolute

RUN = ["data.embedrl.family=qwen2_vl", "platform=gpu"]
JOINED = "+ray_kwargs.ray_init.address=10.0.0.1:6379"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory and none of the variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_relative_paths_become_absolute_and_hub_ids_stay(folder):
    for name in ("train.parquet", "reward.py"):
        (folder / name).touch()
    (folder / "media").mkdir()
    files = ["data.train_files=[train.parquet,/data/more.parquet]", "data.val_files=train.parquet"]
    places = ["data.media_root=media", "reward.custom_reward_function.path=reward.py", "trainer.default_local_dir=out"]
    models = ["actor_rollout_ref.model.path=Qwen/Qwen2-VL-7B-Instruct", "embedrl.embedder.path=media"]
    config = compose([*RUN, *files, *places, *models])
    make_paths_absolute(config)
    assert list(config.data.train_files) == [str(folder / "train.parquet"), "/data/more.parquet"]
    assert config.data.val_files == str(folder / "train.parquet")
    assert (config.data.media_root, config.embedrl.embedder.path) == (str(folder / "media"),) * 2
    assert config.reward.custom_reward_function.path == str(folder / "reward.py")
    assert config.trainer.default_local_dir == str(folder / "out")
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2-VL-7B-Instruct"
    assert config.data.custom_cls.path.startswith("pkg://") and config.trainer.rollout_data_dir is None


@pytest.mark.parametrize(("loggers", "named"), [("console,file", True), ("console", False)])
def test_metrics_are_written_where_the_run_was_started(folder, loggers, named):
    make_paths_absolute(compose([*RUN, f"trainer.logger=[{loggers}]", "trainer.experiment_name=e"]))
    assert os.environ.get("VERL_FILE_LOGGER_PATH") == (str(folder / "embedrl" / "e.jsonl") if named else None)


@pytest.fixture
def joined(monkeypatch) -> dict:
    """What `ray.init` is given, of a cluster that answers and where nobody is at work."""

    def nobody(name, namespace):
        raise ValueError(name)

    given: dict = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    monkeypatch.setattr("ray.get_actor", nobody)
    monkeypatch.setattr(cluster.socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    return given


def test_a_joined_cluster_is_given_the_variables_and_the_configurations_own_win(monkeypatch, joined):
    values = {"HF_HUB_OFFLINE": "1", "WANDB_API_KEY": "secret", "JUDGE_KEY": "secret", "VERL_LOGGING_LEVEL": "INFO"}
    values |= {"HF_HOME": "/shared"}  # the job was submitted with it: Ray refuses to merge, equal or not
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"HF_HOME": "/shared"}}}')
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.7")
    own = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_LOGGING_LEVEL=DEBUG"
    config = compose([*RUN, JOINED, "embedrl.judge.api_key_env=JUDGE_KEY", own])
    join_cluster(config)
    given = joined["runtime_env"]["env_vars"]
    assert {name: given.get(name) for name in values} == {**values, "VERL_LOGGING_LEVEL": "DEBUG", "HF_HOME": None}
    assert joined["address"] == "10.0.0.1:6379" and "TOKENIZERS_PARALLELISM" in given  # one of verl's own
    assert not {"SOMETHING_ELSE", "VLLM_HOST_IP"} & given.keys()
    assert "secret" not in OmegaConf.to_yaml(config), "verl prints and logs the configuration"


def test_a_cluster_of_the_runs_own_is_left_to_verl(joined, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    join_cluster(compose([*RUN, "+ray_kwargs.ray_init.address=local"]))
    assert not joined


def test_a_cluster_where_another_run_is_at_work_is_refused(joined, monkeypatch):
    """Its TransferQueue would be shared."""
    monkeypatch.setattr("ray.get_actor", lambda name, namespace: object())
    with pytest.raises(ResourceError, match="another run is at work in the Ray cluster at 10.0.0.1:6379"):
        join_cluster(compose([*RUN, JOINED]))


def test_a_cluster_that_is_silent_or_gone_is_an_error_in_time(joined, monkeypatch):
    def silent(address, timeout=None):
        assert timeout == cluster.ANSWER_WITHIN_S
        raise TimeoutError("timed out")

    monkeypatch.setattr(cluster.socket, "create_connection", silent)
    with pytest.raises(ResourceError, match=r"cluster at 10.0.0.1:6379 must answer within 10 s; got: timed out"):
        join_cluster(compose([*RUN, JOINED]))
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(ResourceError, match="cluster at auto must answer"):
        join_cluster(compose([*RUN, "+ray_kwargs.ray_init.address=auto"]))


def test_a_cluster_to_join_takes_no_slots_of_ours(joined):
    with pytest.raises(ResourceError, match=r"num_cpus is for a cluster that the run starts itself.*address=local"):
        join_cluster(compose([*RUN, JOINED, "ray_kwargs.ray_init.num_cpus=16"]))
    assert not joined


def test_the_trainer_is_started_on_the_node_of_the_driver(monkeypatch):
    asked: dict = {}
    node = "ab" * 28
    runner = SimpleNamespace(options=lambda **options: asked.update(options) or SimpleNamespace(remote=lambda: "actor"))
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node))
    assert OnThisNode(runner).remote() == "actor"
    where = asked["scheduling_strategy"]
    assert (where.node_id, where.soft, where._spill_on_unavailable) == (node, True, True)


def test_a_home_that_cannot_be_written_is_one_line_before_ray_starts(folder, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    check_home()
    monkeypatch.setenv("HOME", "/proc/nohome")
    with pytest.raises(ResourceError, match=r"/proc/nohome/.ray cannot be written, .* RAY_AUTH_MODE=disabled"):
        check_home()
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "secret"), ("RAY_AUTH_TOKEN_PATH", "/file")):
        with monkeypatch.context() as set_here:
            set_here.setenv(name, value)
            check_home()
