# SPDX-License-Identifier: Apache-2.0
"""A dry run refuses what the run would refuse, as far as it is here; both by one line and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedrl_verl.cli import main
from embedrl_verl.data.files import part_name, write_json
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from tests.config.runs import REQUIRED

PNG = b"\x89PNG"


def pair_file(path: Path, *media: str | bytes, count: int = 4, source: str = "s") -> Path:
    """A parquet file of pairs of one source, of which the first has these images."""
    path.parent.mkdir(exist_ok=True, parents=True)
    queries = [Item("q", images=media if number == 0 else ()) for number in range(count)]
    records = [PairRecord(f"{path.parent}-{n}", source, "", query, Item(f"t{n}")) for n, query in enumerate(queries)]
    write_pairs(records, path)
    return path


def data_set(folder: Path, *media: str | bytes, root: str | None, source: str = "s") -> Path:
    """A data set folder whose card names a media root, in which the media are."""
    pair_file(folder / part_name(0), *media, source=source)
    write_json(folder / "data_card.json", {"media_root": root})
    for path in media:
        file = folder / (root or "") / str(path)
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return folder


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`embedrl plan` of a run with four pairs a step: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    batch = ("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4")

    def run(*overrides: str) -> tuple[int, str, str]:
        code = main(["plan", *REQUIRED, *batch, *overrides])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=x", "data.train_batch_size must be a whole number; got x"),
        ("data.max_prompt_length=1.5", "data.max_prompt_length must be a whole number; got 1.5"),
        ("actor_rollout_ref.actor.optim.lr=abc", "actor_rollout_ref.actor.optim.lr must be a number; got abc"),
        ("actor_rollout_ref.rollout.n=True", "actor_rollout_ref.rollout.n must be a whole number; got True"),
        ("trainer.total_training_steps=x", "trainer.total_training_steps must be a whole number, or null; got x"),
        (
            "embedrl.embedder.profile=foo",
            "embedrl.embedder.profile must be auto or one of embed_rl, qwen3_vl_embedding, gme, vlm2vec_v2; got foo",
        ),
        ("trainer.nnodes=null", "trainer.nnodes must be a whole number; got null"),
    ],
)
def test_a_value_that_cannot_be_is_refused(plan, override, message):
    code, out, error = plan(override)
    assert (code, error) == (2, f"ConfigError: {message}\n") and "EG-RL plan" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def compute_score(batch):\n    return {'score': [float('nan')] * len(batch)}\n",
            "all 8 of the rows of a made",
        ),
        ("def compute_score(data_source, solution_str, ground_truth):\n    return 1\n", "got verl's signature"),
        ("from helpers import gone\n", "cannot import name 'gone' from 'helpers'"),
    ],
)
def test_a_reward_function_that_cannot_train_is_refused(plan, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "helpers.py").write_text("")
    code, out, error = plan("reward.custom_reward_function.path=mine.py")
    assert code == 2 and "EG-RL plan" not in out and error.count("\n") == 1 and message in error


def test_a_reward_function_with_a_helper_is_tried_and_its_prints_are_shown(plan, tmp_path):
    (tmp_path / "mine.py").write_text("from beside import one\ndef compute_score(b):\n    return one(b)\n")
    (tmp_path / "beside.py").write_text("def one(b):\n    print('hello')\n    return {'score': b.rollout}\n")
    code, out, _ = plan("reward.custom_reward_function.path=mine.py")
    assert code == 0 and "mine.py:compute_score(), tried on a made-up batch\n" in out and "hello\n" in out


@pytest.mark.parametrize(
    ("media", "overrides", "message"),
    [
        (["a.png"], [], "row 0: media path 'a.png' needs a media root, and none is set; set data.media_root"),
        (["gone.png"], ["data.media_root=."], "row 0: media path 'gone.png': no such file in the media root"),
        (["../a.png"], ["data.media_root=."], "leaves the media root"),
        (["/etc/hostname"], ["data.media_root=."], "is absolute; paths must be relative to the media root ."),
    ],
)
def test_media_of_the_first_rows_that_the_run_could_not_read_are_refused(plan, tmp_path, media, overrides, message):
    file = pair_file(tmp_path / "train.parquet", *media)
    code, out, error = plan(f"data.train_files={file}", *overrides)
    assert code == 2 and out == "" and error.count("\n") == 1
    assert (
        error.startswith("ConfigError: data.train_files must hold pair records that can be used") and message in error
    )


def test_a_media_root_that_is_elsewhere_is_planned_with_and_marked(plan, tmp_path):
    file = pair_file(tmp_path / "train.parquet", "a.png")
    code, out, _ = plan(f"data.train_files={file}", "data.media_root=/elsewhere")
    assert code == 0 and "data.media_root: no such folder: /elsewhere" in out


def test_media_in_the_rows_need_no_root_and_without_files_nothing_is_said_of_media(plan, tmp_path):
    file = pair_file(tmp_path / "train.parquet", PNG)
    assert "media root        none: media of the first rows are bytes\n" in plan(f"data.train_files={file}")[1]
    assert "media root        none is set\n" in plan("data.train_files=gone.parquet")[1]


@pytest.mark.parametrize("root", ["media", "../images"])
def test_a_data_set_folders_card_names_the_media_root(plan, tmp_path, root):
    folder = data_set(tmp_path / "set", "a.png", root=root)
    code, out, error = plan("data.train_files=set", "data.val_files=set")
    assert code == 0, error
    assert f"media root        {(folder / root).resolve()}\n" in out
    code, _, error = plan("data.train_files=set", "data.media_root=.")
    assert code == 2 and f"media path 'a.png': no such file in the media root {tmp_path}" in error


def test_cards_that_name_different_roots_are_refused_and_one_for_all_wins(plan, tmp_path):
    for name in ("one", "two"):
        data_set(tmp_path / name, f"{name}.png", root="media")
    files = "data.train_files=[one,two]"
    code, _, error = plan(files)
    assert code == 2 and error.count("\n") == 1
    assert f"must have one media root; got {tmp_path}/one/media, {tmp_path}/two/media. `embedrl data" in error
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").touch()
    assert plan(files, "data.media_root=.")[0] == 0


@pytest.mark.parametrize(
    ("counts", "overrides", "got"),
    [
        ({"a": 3}, [], "a 3"),
        ({"a": 8, "b": 3}, [], "b 3"),
        ({"a": 0}, [], "none"),
        ({"a": 8}, ["data.train_max_samples=6"], "all 3"),
    ],
)
def test_fewer_pairs_than_a_batch_are_refused(plan, tmp_path, counts, overrides, got):
    files = [pair_file(tmp_path / name / "f.parquet", count=count, source=name) for name, count in counts.items()]
    code, out, error = plan(f"data.train_files=[{','.join(map(str, files))}]", *overrides)
    assert code == 2 and out == ""
    assert "data.train_files must hold 4 pairs of each data source, a batch, and 4 in all, a step; got" in error
    assert f"; got {got}. Lower data.train_batch_size" in error


def test_a_step_of_several_batches_needs_them_all(plan, tmp_path):
    apart = ["actor_rollout_ref.hybrid_engine=False", "trainer.v1.trainer_mode=egrl_separate_async"]
    apart += ["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=1"]
    apart += ["trainer.v1.separate_async.parameter_sync_step=2", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    apart += ["actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
    for count, code in ((1, 2), (3, 2), (4, 0)):
        file = pair_file(tmp_path / "f.parquet", count=count)
        assert plan(f"data.train_files={file}", *apart)[0] == code, count


def test_steps_of_an_epoch_are_counted_by_source(plan, tmp_path):
    files = [pair_file(tmp_path / name / "f.parquet", count=7, source=name) for name in ("a", "b")]
    out = plan(f"data.train_files=[{','.join(map(str, files))}]")[1]
    assert "(7 pairs); " in out and " = 2 steps an epoch\n" in out


def test_an_address_that_is_none_is_refused(plan, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "none")
    code, out, error = plan()
    assert code == 2 and "EG-RL plan" not in out and "RAY_ADDRESS must be HOST:PORT, auto or local; got" in error


@pytest.mark.parametrize("path", ["/models/gone", "./gone", "../gone"])
def test_a_model_folder_that_is_not_here_is_named_by_the_plan(plan, path):
    code, out, _ = plan(f"actor_rollout_ref.model.path={path}")
    assert code == 0 and f"actor_rollout_ref.model.path: no such folder: {path} (name a folder, or a hub id" in out


def test_the_profile_of_a_hub_id_is_found_out_when_the_run_starts(plan):
    assert "some/embedder (not a folder here: a hub id), profile auto: looked at when the run starts\n" in plan()[1]
