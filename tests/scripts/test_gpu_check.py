# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_check.sh without a GPU: stages that can run do, the others say why not, and each leaves its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ("attention", "packing", "width", "pictures", "engines")
SKIPPED = ("turns", "transfer", "sleep")


def check(out: Path, *stages: str, device: str = "cpu", **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "DEVICE": device, **more}
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_check")
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    *stages, last = done.stdout.splitlines()
    assert [line.split()[0] for line in stages] == [*RUN, *SKIPPED] and last == f"figures: {folder}/STAGE.json"
    return folder


def record(out: Path, stage: str) -> dict:
    return json.loads((out / f"{stage}.json").read_text())


@pytest.mark.parametrize("stage", RUN)
def test_a_stage_runs_at_small_sizes_and_keeps_its_figures(out: Path, stage: str) -> None:
    found = record(out, stage)
    assert (found["stage"], found["verdict"], found["reason"]) == (stage, "passed", ""), found
    assert found["figures"] and found["machine"]["torch"] != "not installed"


@pytest.mark.parametrize("stage", SKIPPED)
def test_a_stage_for_cuda_alone_says_so(out: Path, stage: str) -> None:
    assert (record(out, stage)["verdict"], record(out, stage)["reason"]) == ("skipped", "needs CUDA")


def test_packed_rows_and_fused_log_probs_are_exact_in_float32(out: Path) -> None:
    packing, engines = record(out, "packing")["figures"], record(out, "engines")["figures"]
    assert max(packing.values()) < 1e-5 and len(packing) == 6
    assert engines["fused against whole log-probs"] < 1e-5 and engines["average of the weights"] < 1e-6


def test_without_a_gpu_no_stage_is_run_and_the_way_out_is_named(tmp_path: Path) -> None:
    done = check(tmp_path / "out", "attention", device="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 4 and not (tmp_path / "out").exists()
    assert "torch can use no GPU here" in done.stderr and "DEVICE=cpu" in done.stderr


def test_the_attention_stage_needs_torch_alone(tmp_path: Path) -> None:
    """Everything else is hidden from the interpreter."""
    hidden = ("transformers", "verl", "vllm", "omegaconf", "ray", "numpy", "PIL", "hydra", "peft", "tensordict")
    lines = ("import sys", "class Hide:", "    def find_spec(self, name, path=None, target=None):")
    lines += (f"        if name.partition('.')[0] in {hidden!r}:", "            raise ModuleNotFoundError(name)")
    (tmp_path / "sitecustomize.py").write_text("\n".join([*lines, "sys.meta_path.insert(0, Hide())", ""]))
    done = check(tmp_path / "out", "attention", "packing", "engines", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert record(tmp_path / "out", "attention")["verdict"] == "passed"
    for stage, missing in (("packing", "numpy"), ("engines", "transformers")):
        assert record(tmp_path / "out", stage)["verdict"] == "skipped"
        assert f"needs {missing}" in record(tmp_path / "out", stage)["reason"]


def test_a_figure_outside_of_its_limits_fails_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_check.stage import Figures

    figures = Figures()
    figures.keep("inside", 1.0, at_least=0.5, at_most=1.5)
    figures.keep("free", 7.0)
    assert not figures.failed
    figures.keep("above", 2.0, at_most=1.5)
    figures.keep("below", 0.0, at_least=0.5)
    figures.keep("unknown", float("nan"))
    assert figures.failed == [
        "above must be <= 1.5; got 2",
        "below must be >= 0.5; got 0",
        "unknown must be finite; got nan",
    ]


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = check(tmp_path, "speed")
    assert done.returncode == 2 and "unknown stage speed; there are attention, packing" in done.stderr
