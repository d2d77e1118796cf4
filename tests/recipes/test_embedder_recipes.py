# SPDX-License-Identifier: Apache-2.0
"""The stage 1 recipes: what they pass on is a valid configuration, on one node and on several."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from embedrl_verl.stage1.settings import Stage1Config, load_stage1_config
from tests.recipes.calls import recorded, recording

ROOT = Path(__file__).resolve().parents[2]
# Writes down each call; a checkpoint without <emb> is asked for by a script on standard input.
STAND_IN = (
    recording('"$OUT/calls"')
    + """
case "$*" in
    "- "*) exit "${HAS_EMB:-1}" ;;
    *embedrl_verl.stage1*)
        mkdir -p "$OUT/checkpoints"
        echo 7 >"$OUT/checkpoints/latest_checkpointed_iteration.txt"
        ;;
esac
"""
)


def run(tmp_path: Path, name: str, *arguments: str, **variables: str) -> tuple[int, list[list[str]], str]:
    """Exit code, the calls of Python, and what was printed."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "calls").unlink(missing_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "OUT": str(tmp_path), "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / name), *arguments],
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, recorded(tmp_path / "calls"), done.stdout + done.stderr


def config_of(call: list[str]) -> Stage1Config:
    """The checked configuration of a call of `embedrl_verl.stage1`."""
    return load_stage1_config(compose(call[call.index("embedrl_verl.stage1") + 1 :], "embedder_trainer"))


def test_a_dry_run_passes_the_settings_on_and_needs_no_gpu(tmp_path):
    knobs = {
        "TRAIN_FILES": "a b.parquet,c.parquet",
        "PAIRS": "64",
        "SUB_PAIRS": "32",
        "LORA_RANK": "8",
        "TCOT": "False",
    }
    code, [call], _ = run(tmp_path, "run_embedder_contrastive.sh", "contrastive.seed=5", DRY_RUN="1", **knobs)
    config = config_of(call)
    assert code == 0 and config.data.train_files == ("a b.parquet", "c.parquet") and not config.data.tcot
    assert (config.contrastive.batch_pairs, config.contrastive.sub_batch_pairs, config.contrastive.seed) == (64, 32, 5)
    assert (config.embedder.train.lora_rank, config.embedder.train.lora_alpha) == (8, 16)


@pytest.mark.parametrize("has_emb", [False, True])
def test_a_model_without_the_token_gets_a_copy_first_and_the_result_is_exported(tmp_path, has_emb):
    code, calls, _ = run(
        tmp_path,
        "run_embedder_contrastive.sh",
        RAY_ADDRESS="none",  # only to pass without GPUs here
        GPUS_PER_NODE="2",
        MODEL_PATH="some/model",
        HAS_EMB="1" if has_emb else "0",
    )
    assert code == 0
    names = [next(part for part in call if part.startswith("embedrl_verl")) for call in calls if call[0] != "-"]
    assert names == ["embedrl_verl.cli"] * (not has_emb) + ["embedrl_verl.stage1", "embedrl_verl.cli"]
    train = next(call for call in calls if "embedrl_verl.stage1" in call)
    assert train[:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert config_of(train).embedder.path == ("some/model" if has_emb else f"{tmp_path}/base")
    assert calls[-1][2:5] == ["export", f"{tmp_path}/checkpoints/global_step_7", "--kind"]


def test_several_nodes_need_to_know_each_other(tmp_path):
    several = {"NNODES": "2", "RAY_ADDRESS": "none"}
    code, _, printed = run(tmp_path, "run_embedder_contrastive.sh", **several)
    assert code == 2 and "NODE_RANK=0..1 and MASTER_ADDR" in printed
    code, calls, _ = run(tmp_path, "run_embedder_contrastive.sh", **several, NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    train = next(call for call in calls if "embedrl_verl.stage1" in call)
    assert code == 0 and train[4:10] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    assert "embedrl_verl.cli" not in calls[-1], "only the first node exports"


def test_another_family_or_seed_does_not_train_the_models_of_an_earlier_one(tmp_path):
    assert run(tmp_path, "run_embedder_tiny_cpu.sh")[0] == 0
    code, calls, printed = run(tmp_path, "run_embedder_tiny_cpu.sh", FAMILY="qwen3_vl")
    assert (code, calls) == (2, []) and "FAMILY and SEED 'qwen2_vl 0', not 'qwen3_vl 0'" in printed


def test_the_tiny_recipe_trains_two_that_differ_in_the_input_alone(tmp_path):
    code, calls, printed = run(tmp_path, "run_embedder_tiny_cpu.sh", SEED="3", STEPS="7")
    assert code == 0, printed
    first, second = (config_of(call) for call in calls if "embedrl_verl.stage1" in call)
    assert {first.data.tcot, second.data.tcot} == {True, False}
    assert first.contrastive.total_steps == 7 and first.contrastive.seed == second.contrastive.seed == 3
    assert first.embedder == second.embedder
    assert calls[-1][:2] == ["-m", "embedrl_verl.tiny.stage1_table"]
