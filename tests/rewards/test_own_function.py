# SPDX-License-Identifier: Apache-2.0
"""A reward function of one's own, by `embedrl reward try`: what is refused, helpers beside it, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedrl_verl.cli import main
from embedrl_verl.rewards.functions import NEEDS

VERLS = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
NO_SCORE = "def compute_score(batch):\n    return {'score': [float('nan')] * len(batch)}\n"
HELPED = "from helpers import weight\ndef compute_score(batch):\n    return {'score': batch.rollout * weight()}\n"
LOUD = "print('on import')\n" + HELPED.replace("    return", "    print('called')\n    return")


@pytest.fixture
def tried(tmp_path, write, capsys):
    """`embedrl reward try FILE RUN WORDS`, with the file's text and a helper beside it: exit code and output."""
    write(1)

    def run(text, *words, helper="2.0", folder="a"):
        file = tmp_path / folder / "mine.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        (file.parent / "helpers.py").write_text(f"def weight():\n    return {helper}\n")
        return main(["reward", "try", str(file), str(tmp_path), *words]), capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NO_SCORE, "must give rows a score; all 8 of the rows of the run are NaN, which means unknown"),
        (VERLS, "must be compute_score(batch, **reward_kwargs), called once with all rows of a batch"),
        (VERLS, "got verl's signature for single rows (data_source, solution_str, ground_truth, extra_info)"),
        ("from helpers import gone\n", "cannot be imported in line 1: ImportError: cannot import name 'gone'"),
    ],
)
def test_a_function_that_cannot_train_is_refused_in_one_line(tried, text, message):
    code, said = tried(text)
    assert code == 2 and said.out == "" and said.err.startswith("ConfigError: ") and message in said.err
    assert said.err.count("\n") == 1


def test_a_helper_beside_the_file_is_its_own_and_is_read_anew(tried):
    """Also where another file's helper had the same name."""
    for helper, folder, mean in (("2.0", "a", 1.0), ("4.00", "a", 2.0), ("6.0", "b", 3.0), ("4.00", "a", 2.0)):
        code, said = tried(HELPED, "--json", helper=helper, folder=folder)
        assert code == 0 and json.loads(said.out)["all"]["mean"]["mean"][1] == mean, (helper, folder)


def test_json_is_all_of_standard_output_and_prints_go_to_standard_error(tried):
    code, said = tried(LOUD, "--json")
    assert code == 0 and json.loads(said.out)["all"]["rows"] == 8
    assert said.err.splitlines() == ["on import", "called"]
    assert "called\n" in tried(LOUD)[1].out


def test_terms_that_are_the_same_within_all_groups_are_named(tried):
    text = "def compute_score(batch):\n    own = batch.rollout.float()\n"
    text += "    return {'score': own, 'pair': batch.pair * 0.1, 'half': own * 0.5}\n"
    said = tried(text)[1].out
    assert "variance within groups (mean): score 0.5, pair 0, half 0.12\n" in said
    assert "the same for all rollouts of every prompt, so GRPO learns nothing from it: pair\n" in said
    assert "GRPO learns nothing" not in tried(HELPED)[1].out


@pytest.mark.parametrize("name", sorted(set(NEEDS) - {"paper", "public_code", "gain"}))
def test_a_ready_made_function_is_named_without_a_path(write, tmp_path, capsys, name):
    write(1)
    assert main(["reward", "try", name, str(tmp_path)]) == 0
    assert f"tried:   pkg://embedrl_verl.rewards.functions.{name}:compute_score\n" in capsys.readouterr().out


def test_a_ready_made_function_by_name_is_the_runs_own_by_any_path(write, tmp_path, printed):
    link = Path(__file__).resolve().parents[2] / "reward" / "no_judge.py"
    write(1, function=f"{link}:compute_score", kwargs={"gamma": 0.3})
    assert "identical: every score is the run's own" in printed("no_judge", tmp_path)


@pytest.mark.parametrize(("words", "got"), [([], "none"), (["one", "--dump", "two"], "one and two")])
def test_one_run_is_named(words, got, capsys):
    assert main(["reward", "try", "no_judge", *words]) == 2
    assert capsys.readouterr().err == f"ConfigError: name one RUN, after FILE or with --dump; got {got}\n"
