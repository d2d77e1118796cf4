# SPDX-License-Identifier: Apache-2.0
"""What each GPU recipe asks of verl and vLLM can be built, in every mode, with the judge and without.

Configuration, verl's worker configurations up to the engine, the Embedder's, and vLLM's engine configuration from the
arguments of verl's server are built against a made-up H100 (`rehearsal.py`). The models' forward and backward passes
with these settings are in tests/platforms/test_actor.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from recipes.tiny_digits.models import build_tiny_model
from tests.recipes.calls import ROOT
from tests.recipes.test_gpu_recipes import FSDP, MEGATRON, command_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_vl", "qwen3_vl")
FAMILY = dict(zip((*FSDP, *MEGATRON), FAMILIES, strict=True))
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
MODES = ("sync", "colocate_async", "separate_async")
RUNS = [(name, mode, judge) for name in FAMILY for mode in MODES for judge in (False, True)]
SERVED = 14336 + 2048


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `rehearsal.py` built for each run, in one process, with tiny models whose positions suffice."""
    folder = tmp_path_factory.mktemp("rehearsal")
    for family in CLASSES:
        build_tiny_model(folder / family, family=family, max_positions=32768)
    build_tiny_model(folder / "embedder", seed=1)
    runs = []
    for name, mode, judge in RUNS:
        variables = {"MODE": mode, "MODEL_PATH": str(folder / FAMILY[name]), "EMBEDDER_PATH": str(folder / "embedder")}
        variables |= {"GPUS_PER_NODE": "4"} if mode == "separate_async" else {}
        variables |= {"JUDGE_PATH": str(folder / "qwen3_vl"), "JUDGE_GPUS_PER_NODE": "4"} if judge else {}
        overrides = command_of(folder, name, **variables)[2:]
        runs.append({"name": f"{name} {mode} {judge}", "overrides": overrides, "judge": judge})
    (folder / "runs.json").write_text(json.dumps(runs))
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    command = [
        sys.executable,
        str(ROOT / "tests/recipes/rehearsal.py"),
        str(folder / "runs.json"),
        str(folder / "made"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "made").read_text())


@pytest.mark.parametrize(("name", "mode", "judge"), RUNS)
def test_every_recipe_can_be_built_in_every_mode(made, name, mode, judge):
    run = made[f"{name} {mode} {judge}"]
    engine = "McoreEngineConfig" if name in MEGATRON else "FSDPEngineConfig"
    assert run["actor"]["engine"] == run["reference"]["engine"] == engine
    assert run["actor"]["attention"] == run["embedder"]["attention"] == "torch_varlen"
    assert run["actor"]["packed"] and run["reference"]["packed"]
    assert run["actor"]["fused"] is (name in FSDP)
    assert run["actor"]["offload"] is (name in MEGATRON or mode == "separate_async")
    assert run["embedder"]["engine"] == "FSDPEngineConfig" and run["embedder"]["no_sync"] is False
    rollout = run["rollout"]
    assert rollout["model"] == f"{CLASSES[FAMILY[name]]}ForConditionalGeneration"
    assert (rollout["device"], rollout["dtype"], rollout["max_model_len"]) == ("cuda", "torch.bfloat16", SERVED)
    assert rollout["sleep"] and rollout["extension"].endswith("vllm_worker.GpuColocateWorkerExtension")
    assert ("judge" in run) is judge
    if judge:
        assert run["judge"]["model"] == "Qwen3VLForConditionalGeneration" and run["judge"]["device"] == "cuda"
