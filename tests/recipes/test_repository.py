# SPDX-License-Identifier: Apache-2.0
"""What a newcomer relies on: the README's commands and examples, the pinned environment, and a repository that names no
machine."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from embedrl_verl.data.identity import content_id
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.tcot import parse_tcot

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MINORS = ("3.10", "3.11", "3.12")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def pins() -> list[Requirement]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_two_commands_of_the_readme_come_first_and_their_scripts_exist() -> None:
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first == "bash recipes/run_egrl_tiny_cpu.sh"
    assert second == "bash scripts/test.sh"
    assert second in (ROOT / ".ci" / "run").read_text()
    for name in set(re.findall(r"(?:recipes|scripts)/\w+\.sh", README)):
        assert os.access(ROOT / name, os.X_OK), name


def test_every_document_that_a_document_links_to_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page.name} links to {link}"


def test_the_readmes_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, reward = blocks("python")
    exec(data, {})
    (pair,) = read_pairs(tmp_path / "train.parquet")
    # Written the same way, another row of the photo and the caption has equal contents.
    photo = Item(images=(b"photo 0",))
    rows = [replace(pair, pair_id=str(i), query=photo, target=Item(text=pair.target.text)) for i in range(2)]
    assert content_id(rows[0], None) == content_id(rows[1], None) and not pair.query_id and not pair.target_id
    names: dict[str, Any] = {}
    exec(reward, names)
    tcot = parse_tcot(
        '<thinking>a heron {"text_keywords": ["heron"]}</thinking><rethink>yes</rethink><answer>a</answer>'
    )
    batch = RewardBatch.build(
        side=torch.tensor([0, 0, 1, 1]),
        pair=torch.tensor([0, 1, 0, 1]),
        rollout=torch.zeros(4),
        content=torch.tensor([0, 1, 0, 1]),
        tcots=(tcot,) * 4,
        required=("text_keywords",) * 4,
        embeddings=torch.eye(2).repeat(2, 1),
    )
    score = names["compute_score"](batch, weight=0.5)["score"]
    assert torch.allclose(score, torch.full((4,), 1.5))


@pytest.mark.parametrize("minor", MINORS)
def test_the_pins_are_complete_for_every_python_and_name_no_host(minor: str) -> None:
    environment = {"python_version": minor, "python_full_version": f"{minor}.1"}
    chosen = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    names = [pin.name.lower() for pin in chosen]
    assert len(names) == len(set(names))
    assert all(pin.url is None and re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in chosen)
    by_name = {pin.name.lower(): pin for pin in chosen}
    for line in (ROOT / "requirements" / "cpu.in").read_text().splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate(environment):
                continue
            version = str(by_name[wanted.name.lower()].specifier).removeprefix("==")
            assert wanted.specifier.contains(version, prereleases=True), line
    text = "".join(path.read_text() for path in (ROOT / "requirements").iterdir())
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", text)


def test_merging_resolutions_keeps_one_line_where_versions_agree(tmp_path: Path) -> None:
    lock = runpy.run_path(str(ROOT / "scripts" / "lock_cpu.py"))
    merged = lock["merge"]({"3.10": ["a==1", "b==1"], "3.11": ["a==1", "b==2"], "3.12": ["a==1", "b==2", "c==1"]})
    assert merged == [
        "a==1",
        "b==1 ; python_version == '3.10'",
        "b==2 ; python_version == '3.11' or python_version == '3.12'",
        "c==1 ; python_version == '3.12'",
    ]
    written = tmp_path / "cpu.txt"
    written.write_text("# header\n" + "\n".join(merged) + "\n")
    assert lock["read_pins"](written, "3.11") == ["a==1", "b==2"]
    assert lock["read_pins"](ROOT / "requirements" / "cpu.txt", "3.11")


def test_set_up_without_a_fitting_python_says_what_is_needed(tmp_path: Path) -> None:
    for name in ("scripts/setup_env.sh", "requirements/cpu.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "setup_env.sh")],
        env={"PATH": os.environ["PATH"], "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert "no Python 3.10-3.12 with the venv module was found (tried: no-such-python)" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_key_of_the_projects_own_sections_is_documented() -> None:
    config = yaml.safe_load((ROOT / "embedrl_verl" / "config" / "egrl_trainer.yaml").read_text())
    text = (ROOT / "docs" / "configuration.md").read_text()

    def leaves(section: dict[str, object]) -> list[str]:
        nested = [leaves(value) if isinstance(value, dict) else [key] for key, value in section.items()]
        return [leaf for part in nested for leaf in part]

    for key in leaves(config["embedrl"]) + leaves(config["data"]["embedrl"]):
        assert key in text, f"docs/configuration.md does not explain {key}"


def test_equations_and_rules_lead_to_functions_and_tests_that_exist() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("paper_map.md", "silent_faults.md"))
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    functions = re.findall(r"`embedrl_verl\.([\w.]+)`", text)
    assert len(tests) >= 10 and len(functions) >= 10
    for file, name in tests:
        source = (ROOT / file).read_text()
        assert not name or f"def {name}" in source, f"{file} has no {name}"
    for dotted in functions:
        module, _, name = dotted.rpartition(".")
        folder = ROOT / "embedrl_verl" / module.replace(".", "/")
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert name in file.read_text(), f"embedrl_verl.{dotted} does not exist"


def test_tracked_files_name_no_machine_and_carry_the_licence() -> None:
    machine = re.compile("|".join((r"/" + "work/", r"/" + "root/", r"/" + "tmp/env", r"/home/\w", r"/Users/\w")))
    for path in tracked_files():
        if path.suffix in (".png", ".parquet", ".jpg") or path.name == "LICENSE" or not path.is_file():
            continue
        text = path.read_text()
        assert not machine.search(text), f"{path} names a path of a machine"
        if path.suffix in (".py", ".sh", ".yaml", ".toml") and path.stat().st_size > 0:
            assert "SPDX-License-Identifier: Apache-2.0" in text[:300], path
