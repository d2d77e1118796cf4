# SPDX-License-Identifier: Apache-2.0
"""Imports go one way, pure maths stays pure, and verl is met in few places."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "embedrl_verl"
PURE = ("errors", "kinds", "tcot", "rewards", "evaluation")
# Whatever else needs verl asks one of these.
VERL = ("data", "doctor", "embedder", "plan", "platforms", "stage1", "train", "trainer")


def imports(file: Path) -> set[str]:
    """Modules that a file imports anywhere in it, with their whole names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def folder(file: Path) -> str:
    """The folder of the package that a file is in, or its own name."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = [file for file in PACKAGE.rglob("*.py") if file.name != "__main__.py"]  # entry points stand above all


def test_no_folder_imports_one_that_imports_it():
    needs = defaultdict(set)
    for file in FILES:
        own = {name.split(".")[1] for name in imports(file) if name.startswith("embedrl_verl.")}
        needs[folder(file)] |= own - {folder(file)}
    assert "trainer" in needs and "rewards" in needs["trainer"]
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise AssertionError(f"folders import each other: {' <- '.join(error.args[1])}") from None


def test_pure_code_imports_neither_verl_nor_ray():
    tops = {file: {name.split(".")[0] for name in imports(file)} for file in FILES if folder(file) in PURE}
    assert tops
    assert not [str(file.relative_to(PACKAGE)) for file, names in tops.items() if names & {"verl", "ray", "vllm"}]


def test_verl_is_met_in_few_folders():
    met = {folder(file) for file in FILES if any(name.split(".")[0] == "verl" for name in imports(file))}
    assert met == set(VERL), "a folder fewer is progress: take it out of the list"
