# SPDX-License-Identifier: Apache-2.0
"""How a command ends: a refusal and Ctrl-C are one message and an exit code, and no error comes with all overrides."""

from __future__ import annotations

import sys

import pytest

from embedrl_verl.entry import run_entry
from embedrl_verl.errors import DataError

OVERRIDES = ["data.train_files=[a.parquet]", "embedrl.embedder.path=some/embedder"]


@pytest.fixture
def end(monkeypatch, capsys):
    """Run a task that raises; returns what came out of `run_entry`, and standard error."""

    def call(error: BaseException | None, *overrides: str) -> tuple[BaseException, str]:
        def task(config):
            assert error is not None
            raise error

        monkeypatch.setattr(sys, "argv", ["train", *OVERRIDES, *overrides])
        with pytest.raises(BaseException) as raised:
            run_entry(task, "egrl_trainer")
        return raised.value, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("error", "overrides", "code", "message"),
    [
        (DataError("no rows"), [], 3, "\nDataError: no rows\n"),
        (None, ["data.train_batch_siz=8"], 2, "\nConfigError: "),
        (KeyboardInterrupt("step 3: update"), [], 130, "\ninterrupted (step 3: update); the same command goes on"),
        (KeyboardInterrupt(), [], 130, "\ninterrupted; the same command goes on from there\n"),
    ],
)
def test_a_refusal_and_ctrl_c_are_one_message_and_an_exit_code(end, monkeypatch, error, overrides, code, message):
    monkeypatch.delenv("EMBEDRL_RECIPE", raising=False)
    stop, said = end(error, *overrides)
    assert isinstance(stop, SystemExit) and stop.code == code
    assert message in said
    assert "a.parquet" not in said and "Traceback" not in said


def test_another_error_stays_itself_without_the_list_of_overrides(end):
    error, said = end(ZeroDivisionError("a bug"))
    assert isinstance(error, ZeroDivisionError) and said == ""


def test_within_a_recipe_which_says_it_itself_ctrl_c_is_silent(end, monkeypatch):
    monkeypatch.setenv("EMBEDRL_RECIPE", "1")
    stop, said = end(KeyboardInterrupt("step 3: update"))
    assert isinstance(stop, SystemExit) and (stop.code, said) == (130, "")
