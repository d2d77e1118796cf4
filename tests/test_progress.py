# SPDX-License-Identifier: Apache-2.0
"""The progress line follows the metrics file and loses no part of it."""

import json
import sys
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from embedrl_verl.progress import (
    Waiting,
    describe,
    metrics_file,
    note_stage,
    prints_shown,
    progress_line,
    read_metrics,
    stage_path,
)


def _line(step, **data):
    return json.dumps({"step": step, "data": data}) + "\n"


def test_an_earlier_part_of_a_resumed_run_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    config = OmegaConf.create({"trainer": {"logger": ["console", "file"], "project_name": "p", "experiment_name": "e"}})
    path.write_text(_line(1, reward=0.1) + _line(2, reward=0.2))
    assert metrics_file(config) == path
    assert not path.exists()
    path.write_text(_line(2, reward=0.25) + _line(3, reward=0.3))
    assert metrics_file(config) == path
    path.write_text(_line(4, reward=0.4))
    values = {step: metrics["reward"] for step, metrics in read_metrics(path).items()}
    assert values == {1: 0.1, 2: 0.25, 3: 0.3, 4: 0.4}


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(1, reward=0.1) + _line(2, reward=0.2)[:-5])
    assert read_metrics(path) == {1: {"reward": 0.1}}
    path.write_text(_line(1, reward=0.1) + _line(2, reward=0.2).rstrip())
    assert list(read_metrics(path)) == [1]


def test_without_the_file_logger_there_is_no_line():
    config = OmegaConf.create({"trainer": {"logger": "console", "project_name": "p", "experiment_name": "e"}})
    assert metrics_file(config) is None
    with progress_line(None):
        pass


def test_the_line_outlives_a_number_that_was_not_finite(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(_line(step, **{"embedrl/reward/mean": value}) for step, value in ((1, 0.3), (2, None), (3, 0.4)))
    )
    with progress_line(path, each_step=True, interval=0.01):
        pass  # what is there at the end is read all the same
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err and "reward 0.400" in shown.out


def test_pairs_that_are_too_long_are_said_once_with_their_sources(tmp_path, capfd):
    left_out = {"data/left_out/train": 16, "data/pairs/train": 48, "data/left_out/train/a%2Fb": 12}
    left_out |= {"data/left_out/train/c": 4, "data/left_out/val": 8, "data/pairs/val": 24, "data/left_out/val/c": 8}
    path = tmp_path / "metrics.jsonl"
    path.write_text(_line(0, **left_out) + _line(1, **left_out))
    with progress_line(path, interval=0.01):
        pass
    shown = capfd.readouterr()
    wanted = "16 of 48 training pairs (a%2Fb 12, c 4); 8 of 24 validation pairs (c 8)"
    assert (shown.out + shown.err).count(f"left out, longer than data.max_prompt_length: {wanted}") == 1


def _run_of_two_steps(path):
    path.write_text(_line(0, **{"val-core/all/hit@1": 0.5}))
    with path.open("a") as handle:
        for step in (1, 2):
            handle.write(_line(step, **{"embedrl/total_steps": 2, "embedrl/reward/mean": step / 10}))
        handle.write('{"step": 3, "da')  # a line that is still being written


@pytest.mark.parametrize("each_step", [False, True])
def test_without_a_terminal_there_are_lines_and_no_bar(tmp_path, capfd, each_step):
    path = tmp_path / "metrics.jsonl"
    with progress_line(path, each_step=each_step, interval=0.01):
        _run_of_two_steps(path)
    shown = capfd.readouterr()
    first = ["EG-RL: step 1/2  reward 0.100  val Hit@1 0.500"] if each_step else []
    last = "EG-RL: step 2/2  reward 0.200  val Hit@1 0.500"
    assert shown.out.splitlines() == ["EG-RL: before training  val Hit@1 0.500", *first, last] and not shown.err


def test_a_terminal_has_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = tmp_path / "metrics.jsonl"
    with progress_line(path, interval=0.01):
        _run_of_two_steps(path)
    shown = capfd.readouterr()
    assert "before training  val Hit@1 0.500" in shown.out and "step 2/2" not in shown.out
    assert "2/2" in shown.err and "reward 0.200" in shown.err


@pytest.mark.parametrize("stage", ["starting Ray", "step 3: rollouts"])
def test_a_silence_ends_with_what_is_waited_for(tmp_path, capfd, stage):
    path = tmp_path / "metrics.jsonl"
    with progress_line(path, quiet_s=0.0, interval=0.01):
        assert stage_path(path).read_text() == "starting Ray"
        note_stage(path, stage)
    assert capfd.readouterr().out.splitlines()[-1] == f"EG-RL: {stage} (0 s)"


@pytest.mark.parametrize(("quiet_s", "said"), [(3600.0, ""), (0.0, "EG-RL: starting Ray (0 s)\n")])
def test_nothing_is_said_before_a_line_is_due(capsys, quiet_s, said):
    Waiting("EG-RL", "starting Ray", quiet_s=quiet_s).look()
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_only_an_interrupted_run_leaves_where_it_stands(tmp_path, error):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(error) if error else nullcontext(), progress_line(path, interval=0.01):
        note_stage(path, "step 3: rollouts")
        if error:
            raise error
    assert stage_path(path).exists() == bool(error)


def test_unknown_numbers_are_left_out():
    assert describe({"timing_s/step": 3.25, "embedrl/reward/mean": None}) == "s/step 3.2"
    assert describe({"timing_s/step": 3.25}) == "s/step 3.2"


def test_what_a_reward_function_prints_is_shown_where_ray_would_keep_it(tmp_path, monkeypatch, capfd):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    trainer = {"logger": ["file"], "project_name": "p", "experiment_name": "e"}
    (tmp_path / "metrics.printed").write_text("of an earlier run\n")
    for through_ray in (True, False):
        config = OmegaConf.create({"trainer": trainer, "ray_kwargs": {"ray_init": {"log_to_driver": through_ray}}})
        with progress_line(metrics_file(config), interval=0.01):
            with prints_shown(config):
                print("straight" if through_ray else "by the file")
            with prints_shown(config):
                print("again")
        shown = capfd.readouterr().out
        assert shown.splitlines() == ["straight" if through_ray else "by the file", "again"]
        assert (tmp_path / "metrics.printed").exists() is not through_ray
