# SPDX-License-Identifier: Apache-2.0
"""`embedrl doctor` tells whether a run could start here, and why not."""

import sys

import pytest

from embedrl_verl import doctor
from embedrl_verl.doctor import Finding


def test_the_report_names_versions_plugin_platform_and_recipe(capsys):
    code = doctor.main()
    text = capsys.readouterr().out
    for label in ("verl", "vllm", "torch", "ray", "plugin", "platform", "GPUs", "CPUs", "memory", "recipe"):
        assert f" {label} " in text
    assert code == (4 if "!!" in text else 0)


@pytest.mark.parametrize(("ok", "code", "mark"), [(True, 0, "  "), (False, 4, "!!")])
def test_one_bad_line_is_exit_code_4(ok, code, mark, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: [Finding("x", "text", ok=ok)])
    assert doctor.main() == code
    assert capsys.readouterr().out.startswith(f"{mark} x ")


@pytest.mark.parametrize(
    ("policy", "installed", "reason"),
    [
        ("none", True, "VERL_USE_EXTERNAL_PLUGINS=none leaves it out"),
        ("other", True, "VERL_USE_EXTERNAL_PLUGINS=other leaves it out"),
        ("auto", True, "verl hides the error"),
        ("auto", False, "no entry point 'embedrl'"),
    ],
)
def test_a_plugin_that_is_not_loaded_has_a_reason(policy, installed, reason, monkeypatch):
    monkeypatch.delitem(sys.modules, "embedrl_verl.platforms.plugin", raising=False)
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    if not installed:
        monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    finding = doctor.plugin_finding()
    assert not finding.ok and reason in finding.text
