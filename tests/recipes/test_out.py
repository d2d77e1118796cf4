# SPDX-License-Identifier: Apache-2.0
"""Where recipes write: OUT from any folder, one run at a time, nothing left elsewhere."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

from embedrl_verl.config.compose import compose
from tests.recipes.calls import ROOT, Recipe
from tests.recipes.test_gpu_recipes import path_with_gpus

TINY, GPU, STAGE_1 = "run_egrl_tiny_cpu.sh", "run_egrl_qwen3vl.sh", "run_embedder_contrastive.sh"
RECIPES = (TINY, GPU, STAGE_1, "run_embedder_tiny_cpu.sh", "build_data_tiny_cpu.sh", "compare_tiny_cpu.sh")


@pytest.fixture
def on_a_node(tmp_path: Path) -> dict[str, str]:
    """A machine with 8 GPUs and a model that has <emb>."""
    return {"PATH": path_with_gpus(tmp_path, 8), "HAS_EMB": "1"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, on_a_node, name):
    (tmp_path / "file").touch()
    recipe = Recipe(tmp_path, name)
    assert recipe.run("a=b", OUT=str(tmp_path / "file" / "out"), **on_a_node) == (2, [])
    asked = f"OUT={tmp_path}/file/out cannot be written; choose a folder that can: OUT=/path/to/folder"
    assert recipe.said == f"[recipe] {asked} bash {ROOT}/recipes/{name} 'a=b'\n"


@pytest.mark.parametrize("name", RECIPES)
def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tmp_path, on_a_node, name):
    recipe = Recipe(tmp_path, name)
    recipe.out.mkdir()
    with (recipe.out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert recipe.run(**on_a_node) == (2, [])
    assert (
        recipe.said.startswith(f"[recipe] OUT={recipe.out} is in use by another run") and recipe.said.count("\n") == 1
    )
    assert "OUT=/path/to/folder bash" in recipe.said
    assert [path.name for path in recipe.out.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", [TINY, "run_embedder_tiny_cpu.sh"])
def test_a_checkout_that_cannot_be_written_asks_for_a_python(tmp_path: Path, name: str) -> None:
    for folder in ("recipes", "scripts", "reward"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder)
    (tmp_path / "checkout" / ".venv.lock").mkdir()  # a folder in its place cannot be written, by nobody
    command = ["bash", f"checkout/recipes/{name}"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "OUT": "out"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    wanted = "cannot be written, so there can be no .venv; name an environment that has verl and embedrl_verl:"
    line = f"[recipe] {tmp_path}/checkout {wanted} PYTHON=/path/to/python bash checkout/recipes/{name}\n"
    assert done.stdout + done.stderr == line


@pytest.mark.parametrize("name", [TINY, GPU, STAGE_1])
def test_paths_are_relative_to_the_folder_of_the_user(tmp_path, on_a_node, name):
    recipe = Recipe(tmp_path, name)
    recipe.cwd = tmp_path / "mine"
    recipe.cwd.mkdir()
    for file in ("my_reward.py", "a.parquet", "v.parquet"):
        (recipe.cwd / file).touch()
    own = {"TRAIN_FILES": "a.parquet", "VAL_FILES": "v.parquet", "REWARD": "my_reward.py"}
    code, calls = recipe.run(OUT="rel", **own, **on_a_node)
    assert code == 0, recipe.said
    call = next(call for call in calls if call[:2] == ["-m", "embedrl_verl.train"] or "embedrl_verl.stage1" in call)
    config = compose([word for word in call if "=" in word], "embedder_trainer" if name == STAGE_1 else "egrl_trainer")
    out = config.contrastive.out if name == STAGE_1 else config.trainer.default_local_dir
    # The recipe has not left the user's folder: what is relative there, the package makes absolute.
    assert (recipe.cwd / out).is_relative_to(recipe.cwd / "rel") and (recipe.cwd / out).is_dir()
    assert list(config.data.train_files) == ["a.parquet"]


@pytest.mark.parametrize("fails", ["", "train"])
@pytest.mark.parametrize("name", [TINY, GPU])
def test_nothing_is_left_in_the_temporary_folder_and_rays_logs_are_kept(tmp_path, on_a_node, name, fails):
    recipe = Recipe(tmp_path, name)
    temporary = Path(subprocess.check_output(["mktemp", "-d", "/tmp/rXXXXXX"], text=True).strip())
    try:
        code, _ = recipe.run(FAIL=fails, TMPDIR=str(temporary), WRITES="1", **on_a_node)
        assert code == bool(fails)
        assert [path.name for path in temporary.iterdir()] == []
        assert (recipe.out / "ray_logs" / "worker.out").read_text() == "of this run"
    finally:
        shutil.rmtree(temporary)


@pytest.mark.parametrize(
    ("name", "variables", "loggers"),
    [
        (TINY, {}, ["file"]),
        (GPU, {}, ["file", "console"]),
        (TINY, {"LOGGER": "console"}, ["file", "console"]),
        (GPU, {"LOGGER": "tensorboard,wandb"}, ["file", "tensorboard", "wandb"]),
        (GPU, {"LOGGER": ""}, ["file"]),
    ],
)
def test_loggers_are_named_by_one_variable(tmp_path, name, variables, loggers):
    _, [call] = Recipe(tmp_path, name).run(DRY_RUN="1", **variables)
    assert list(compose(call[2:]).trainer.logger) == loggers


def test_a_list_of_files_is_no_pattern(tmp_path):
    (tmp_path / "x1.parquet").touch()
    script = f"source {ROOT}/recipes/common.sh; hydra_list 'x[1].parquet,b c.parquet'"
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "['x[1].parquet','b c.parquet']\n"


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [("OUT", "o'clock", "without '"), ("OUT", "${a}", "$;"), ("OUT", "a[1]", "[, ], * and ?")],
)
def test_a_path_that_the_rl_stage_could_not_be_told_is_refused_at_once(tmp_path, name, part, words):
    environment = {"PATH": "/usr/bin:/bin", name: str(tmp_path / part)}
    script = ["bash", str(ROOT / "recipes" / "run_egrl_tiny_cpu.sh")]
    found = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and f"{name} must be a path" in found.stderr and words in found.stderr
    assert not (tmp_path / part).exists()
