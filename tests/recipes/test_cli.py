# SPDX-License-Identifier: Apache-2.0
"""The command line: light to start, and one line with an exit code for every error of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from embedrl_verl import cli
from embedrl_verl.errors import ConfigError, DataError, EmbedderError, EmbedRLError


def test_help_imports_neither_torch_nor_verl() -> None:
    code = "import sys; from embedrl_verl import cli; cli.build_parser(); print({'torch', 'verl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 3), (EmbedderError, 4)])
def test_an_error_is_one_line_on_standard_error_and_its_exit_code(
    error: type[EmbedRLError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise error("rule, value, fix")

    monkeypatch.setattr("embedrl_verl.config.compose.compose", refuse)
    assert cli.main(["plan"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"{error.__name__}: rule, value, fix\n"
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["data"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: embedrl" in capsys.readouterr().err
