# SPDX-License-Identifier: Apache-2.0
"""Stage 1 as a person runs it: it learns, ranks do not change it, a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.platforms.forkserver import python
from embedrl_verl.progress import read_metrics
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import write_world
from tests import processes

pytestmark = [pytest.mark.slow]

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An untrained Embedder and annotated pairs of two picture sources."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "data", sft=4, train=16, heldout=4)
    build_tiny_model(folder / "model", seed=3)
    for name in ("train_tcot", "heldout_tcot"):
        records = read_pairs(folder / "data" / f"{name}.parquet")
        write_pairs([r for r in records if r.data_source in ("digits_i2t", "digits_vqa")], folder / f"{name}.parquet")
    return folder


def command(world: Path, out: Path, *overrides: str) -> list[str]:
    return [
        *("-m", "embedrl_verl.stage1"),
        f"data.train_files=[{world / 'train_tcot.parquet'}]",
        f"data.val_files=[{world / 'heldout_tcot.parquet'}]",
        "data.embedrl.family=qwen2_vl",
        *(f"{section}.image_min_tokens=1" for section in ("data.embedrl", "embedrl.embedder")),
        f"embedrl.embedder.path={world / 'model'}",
        "embedrl.embedder.dtype=float32",
        "embedrl.embedder.max_tokens_per_gpu=1024",
        "embedrl.embedder.train.max_tokens_per_gpu=1024",
        "embedrl.embedder.train.lora_rank=0",
        "embedrl.embedder.train.lr=1e-3",
        "embedrl.embedder.train.warmup_steps=2",
        f"contrastive.out={out}",
        "contrastive.batch_pairs=8",
        "contrastive.sub_batch_pairs=4",
        f"contrastive.total_steps={STEPS}",
        "contrastive.save_freq=2",
        "contrastive.raw_share=0.3",
        "contrastive.num_workers=1",
        *overrides,
    ]


def run(arguments: list[str], *, ranks: int = 1) -> None:
    """In a new interpreter, as a person runs it; the ranks of several are forked."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python", python()]
    done = subprocess.run(
        [sys.executable, *(launch if ranks > 1 else []), *arguments],
        env={**os.environ, **CPU_ENV},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def run_forked(arguments: list[str], folder: Path, code: int = 0) -> str:
    """Output in a process that has the imports and must end with `code`."""
    found, text = processes.run(arguments, folder / "output.txt")
    assert found == code, text[-4000:]
    return text


def metrics(out: Path, name: str = "loss") -> dict[int, float]:
    return {step: data[name] for step, data in read_metrics(out / "metrics.jsonl").items() if name in data}


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(command(world, out))
    return out


def kill_after_update_2(arguments: list[str], out: Path, begun: Path | None, happened: Callable[[], bool]) -> None:
    """Kill -9 a run that goes on from `begun`, and its loaders, as soon as something has happened; again if its next
    checkpoint was complete by then."""
    latest = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    for _ in range(10):
        shutil.rmtree(out, ignore_errors=True)
        if begun is not None:
            shutil.copytree(begun, out)
        process = processes.start(arguments, out.parent / "killed.txt")
        deadline = time.monotonic() + 300
        while not happened():
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.001)
        processes.kill(process)
        if latest.read_text() == "2":
            break
    assert latest.read_text() == "2"


def test_a_run_killed_between_updates_and_one_killed_in_a_checkpoint_go_on_with_the_same_losses(
    unbroken, world, tmp_path
):
    out = tmp_path / "run"
    arguments = command(world, out)
    kill_after_update_2(arguments, out, None, lambda: len(metrics(out)) >= 3)
    before = shutil.copytree(out, tmp_path / "before")
    kill_after_update_2(arguments, out, before, lambda: (out / "checkpoints" / "global_step_4" / "embedder").exists())
    assert "going on after update 2" in run_forked(arguments, tmp_path)
    expected, found = metrics(unbroken), metrics(out)
    assert list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-6)
    for name in ("val-core/all/hit@1", "raw/val-core/all/hit@1"):
        assert metrics(out, name) == metrics(unbroken, name)
    assert len(set(expected.values())) == STEPS
    # Nothing is left to do, and other settings are refused.
    text = run_forked([*arguments, "embedrl.embedder.train.temperature=0.1"], tmp_path, code=2)
    assert "begun with other settings (temperature)" in text


def test_two_ranks_take_the_same_steps_as_one(unbroken, world, tmp_path):
    run(command(world, tmp_path / "run"), ranks=2)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(unbroken), rel=1e-3)
    assert metrics(tmp_path / "run", "grad_norm") == pytest.approx(metrics(unbroken, "grad_norm"), rel=1e-2)


def test_the_checkpoint_tells_data_settings_and_scores(unbroken, world):
    training = json.loads((unbroken / "checkpoints" / f"global_step_{STEPS}" / "training.json").read_text())
    assert (training["stage"], training["step"], training["base_model"]) == ("contrastive", STEPS, str(world / "model"))
    assert training["data"] == [{"source": s, "pairs": 16} for s in ("digits_i2t", "digits_vqa")]
    assert training["settings"]["temperature"] == 0.02 and training["settings"]["tcot"] is True
    assert 0 <= training["scores"]["hit@1 (all)"] <= 1


def test_an_adapter_alone_is_trained(world, tmp_path):
    lora = ["embedrl.embedder.train.lora_rank=4", "embedrl.embedder.train.lora_alpha=8"]
    more = ["contrastive.total_steps=3", "embedrl.embedder.train.lr=1e-2"]
    run_forked(command(world, tmp_path / "run", *lora, *more), tmp_path)
    folder = tmp_path / "run" / "checkpoints" / "global_step_3" / "embedder"
    saved = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=True)
    moved = [name for name, value in saved.items() if "lora_B" in name and value.to_local().abs().max() > 0]
    assert moved and not any("visual" in name for name in saved if "lora_" in name)
    before = [value for name, value in load_file(world / "model" / "model.safetensors").items() if "q_proj" in name]
    bases = [value.to_local() for name, value in saved.items() if "q_proj.base_layer.weight" in name]
    assert bases and all(any(torch.equal(value, old) for old in before) for value in bases)


def test_a_refusal_is_one_message_and_its_code(world, tmp_path):
    text = run_forked(command(world, tmp_path / "run", "data.train_files=[nowhere.parquet]"), tmp_path, code=2)
    assert "data.train_files: no such file or data set folder: nowhere.parquet" in text


def test_a_broken_checkpoint_stops_at_the_first_loss(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if name.endswith("layers.1.input_layernorm.weight"))][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    text = run_forked(command(world, tmp_path / "run", f"embedrl.embedder.path={tmp_path / 'model'}"), tmp_path, code=4)
    assert "16 of 16 vectors are not finite, so the loss would be NaN" in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_targets_that_are_all_the_same_are_skipped_counted_and_stop_the_run(world, tmp_path):
    records = read_pairs(world / "train_tcot.parquet")
    write_pairs([replace(record, target_id="one") for record in records], tmp_path / "same.parquet")
    same = [f"data.train_files=[{tmp_path / 'same.parquet'}]", "contrastive.max_empty_batches=2"]
    text = run_forked(command(world, tmp_path / "run", *same), tmp_path, code=4)
    assert "update 1 skipped, sources digits_" in text
    assert ": a contrastive batch needs at least two pairs" in text
    assert "2 batches in a row without negatives (contrastive.max_empty_batches)" in text
