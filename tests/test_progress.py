# SPDX-License-Identifier: Apache-2.0
"""The progress line follows the metrics file and loses no part of it."""

import json
import time

from omegaconf import OmegaConf

from embedrl_verl.progress import describe, metrics_file, prints_shown, progress_line, read_metrics


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
    with progress_line(path, interval=0.01):
        pass  # what is there at the end is read all the same
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err and "reward 0.400" in shown.err


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


def test_the_line_shows_every_step_that_was_written(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    with progress_line(path, interval=0.01):
        path.write_text(_line(0, **{"val-core/all/hit@1": 0.5}))
        with path.open("a") as handle:
            for step in (1, 2):
                handle.write(_line(step, **{"embedrl/total_steps": 2, "embedrl/reward/mean": step / 10}))
                handle.flush()
                time.sleep(0.05)
            handle.write('{"step": 3, "da')  # a line that is still being written
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("before training") == 1
    assert "before training  val Hit@1 0.500" in shown.out + shown.err
    assert "2/2" in shown.err
    assert "reward 0.200" in shown.err


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
