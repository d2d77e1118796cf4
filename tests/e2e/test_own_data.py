# SPDX-License-Identifier: Apache-2.0
"""A new user's hour: the commands of docs/own_data.md, as they stand there, on 12 pictures and with short trainings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
SHORTER = {"draw.py 60": "draw.py 12", "--holdout 12": "--holdout 4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like a checkout, after the page's commands."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("recipes", "data_preprocess", "embedrl_verl", "reward"):
        (folder / name).symlink_to(ROOT / name)
    page = (ROOT / "docs" / "own_data.md").read_text()
    (folder / "mydata").mkdir()
    (folder / "mydata" / "draw.py").write_text(re.search("```python\n(.*?)```", page, re.DOTALL)[1])
    commands = "\n".join(re.findall("```bash\n(.*?)```", page, re.DOTALL))
    for long, short in SHORTER.items():
        assert long in commands
        commands = commands.replace(long, short)
    bin_ = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"PRETRAIN_STEPS": "5", "STEPS": "1", "VERL_PLATFORM": "cpu"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    (folder / "log.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def test_the_table_and_the_results_are_about_the_users_pairs(folder):
    result = json.loads((folder / "runs" / "photos" / "results.json").read_text())
    (run,) = result["runs"].values()
    assert set(run["hit@1_by_source"]["after"]) == {"photos", "all"}
    assert "digits" not in json.dumps(result)
    evaluation = json.loads((folder / "runs" / "photos" / "evaluation.json").read_text())
    assert evaluation["queries"] == {"photos": 4} and list(evaluation["views"]) == ["raw", "before", "after"]
    assert (folder / "runs" / "photos" / "curves.png").stat().st_size > 10_000
    log = (folder / "log.txt").read_text()
    assert "Hit@1 by data source" in log and "after against raw" in log


def test_the_pages_show_the_users_pictures(folder):
    for name, sides in (("rollouts", 4), ("steps", 8)):
        html = (folder / "runs" / "photos" / f"{name}.html").read_text()
        assert html.count("<article") == sides and html.count('<img src="data:') >= sides
        assert "Find the caption of this photo." in html


def test_any_two_reasoners_are_compared_on_any_pair_file(folder):
    result = json.loads((folder / "runs" / "photos_eval" / "evaluation.json").read_text())
    assert list(result["views"]) == ["raw", "before", "after"] and result["pairs"] == 4
