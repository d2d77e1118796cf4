# SPDX-License-Identifier: Apache-2.0
"""A resumed run keeps what rewarded it so far: the Embedder's weights and settings, evidence, prompts, reward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedrl_verl.config import load_embedrl_config
from embedrl_verl.config.compose import compose
from embedrl_verl.errors import ConfigError
from embedrl_verl.export.record import read_record
from embedrl_verl.rewards.load import load_reward_function
from embedrl_verl.trainer.checkpoint import (
    RECORD,
    check_run_record,
    model_digest,
    record_scores,
    run_record,
    write_records,
)
from recipes.tiny_digits.models import build_tiny_model


def write_run_record(folder: str, record: dict[str, Any]) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / RECORD).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("embedder") / "model")


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text("def compute_score(batch, weight=1.0):\n    return {'score': batch.format()}\n")
    return file


@pytest.fixture
def record(model: Path, reward: Path):
    """`record(*overrides)`: of a run with them."""

    def make(*overrides: str) -> dict[str, Any]:
        base = [f"embedrl.embedder.path={model}", f"reward.custom_reward_function.path={reward}"]
        config = compose([*base, "data.embedrl.family=qwen2_vl", *overrides])
        return run_record(config, load_embedrl_config(config))

    return make


def test_the_same_run_passes_also_with_its_models_in_another_place(record, model, tmp_path):
    step = tmp_path / "global_step_3"
    write_run_record(str(step), record())
    moved = shutil.copytree(model, tmp_path / "moved")
    more = ["embedrl.embedder.max_tokens_per_gpu=7000", "trainer.total_epochs=9", "embedrl.embedder.offload=False"]
    check_run_record(str(step), record(f"embedrl.embedder.path={moved}", *more))
    assert [file.name for file in step.iterdir()] == [RECORD]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("embedrl.embedder.image_max_tokens=256", "embedrl.embedder.image_max_tokens was 768 and is 256"),
        ("embedrl.evidence.max_items=3", "embedrl.evidence.max_items was 8 and is 3"),
        ("data.embedrl.prompt_style=compact", "data.embedrl.prompt_style was 'paper' and is 'compact'"),
        ("data.embedrl.image_max_tokens=512", "data.embedrl.image_max_tokens was 768 and is 512"),
        ("data.max_response_length=1024", "data.embedrl.max_response_length was 2048 and is 1024"),
        ("+reward.custom_reward_function.reward_kwargs.weight=2.0", "reward_kwargs was {} and is {'weight': 2.0}"),
        ("actor_rollout_ref.rollout.n=4", "actor_rollout_ref.rollout.n was 8 and is 4"),
        ("reward.custom_reward_function.name=other", "function was 'compute_score' and is 'other'"),
        ("reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.no_judge", "function.code was"),
        ("embedrl.judge.urls=[http://judge:8000]", "embedrl.judge.style was None and is 'paper'"),
    ],
)
def test_a_setting_that_changes_rewards_is_refused_with_both_values(record, tmp_path, override, named):
    write_run_record(str(tmp_path), record())
    with pytest.raises(ConfigError, match="cannot be resumed with other rewards") as refused:
        check_run_record(str(tmp_path), record(override))
    assert named in str(refused.value)


def test_the_judge_counts_where_there_is_one(record, tmp_path):
    judged = ["reward.reward_model.enable=True", "reward.reward_model.model_path=/models/judge"]
    write_run_record(str(tmp_path), record(*judged))
    check_run_record(str(tmp_path), record(*judged, "embedrl.judge.limit=8"))
    for override, named in (
        ("embedrl.judge.hard_pairs=2", "embedrl.judge.hard_pairs was 4 and is 2"),
        ("reward.reward_model.model_path=/models/other", "embedrl.judge.path was '/models/judge'"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_run_record(str(tmp_path), record(*judged, override))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("embedrl.judge.model=other", "judge.model was None and is 'other'"),
        ("embedrl.judge.style=compact", "judge.style was 'paper' and is 'compact'"),
        ("embedrl.judge.images=True", "judge.images was False and is True"),
        ("embedrl.judge.shared_lists=False", "judge.shared_lists was True and is False"),
        ("embedrl.judge.constrained=False", "judge.constrained was True and is False"),
        ("embedrl.judge.max_tokens=9", "judge.max_tokens was 8 and is 9"),
        ("embedrl.judge.temperature=0.5", "judge.temperature was 0.0 and is 0.5"),
        ("embedrl.judge.seed=1", "judge.seed was 0 and is 1"),
        ("+embedrl.judge.extra_body.top_k=1", "judge.extra_body was {} and is {'top_k': 1}"),
    ],
)
def test_every_setting_of_a_judges_answer_counts(record, tmp_path, override, named):
    judged = "embedrl.judge.urls=[http://judge:8000]"
    write_run_record(str(tmp_path), record(judged))
    with pytest.raises(ConfigError) as refused:
        check_run_record(str(tmp_path), record(judged, override))
    assert named in str(refused.value)


def test_a_reward_function_of_any_kind_and_place_has_a_record(record, tmp_path):
    file = tmp_path / "partial.py"
    file.write_text("import functools\ndef f(batch, a): return {}\ncompute_score = functools.partial(f, a=1)\n")
    own = record(f"reward.custom_reward_function.path={file}")
    moved = tmp_path / "elsewhere.py"
    moved.write_text(file.read_text())
    write_run_record(str(tmp_path / "step"), own)
    check_run_record(str(tmp_path / "step"), record(f"reward.custom_reward_function.path=file://{moved}"))


def test_another_code_of_the_same_reward_file_is_refused(record, reward, tmp_path):
    write_run_record(str(tmp_path), record())
    reward.write_text(reward.read_text().replace("batch.format()", "batch.format() * weight"))
    with pytest.raises(ConfigError, match=r"reward.custom_reward_function.code was '[0-9a-f]{64}'"):
        check_run_record(str(tmp_path), record())


def test_a_helper_beside_the_reward_file_counts_as_its_code(record, reward, tmp_path):
    """As loaded: verl imports the file after `allow_helpers`."""
    records = []
    for weight in ("1", "2.5"):
        reward.write_text("from helpers import weight\ndef compute_score(batch): return {'score': weight}\n")
        (tmp_path / "helpers.py").write_text(f"weight = {weight}\n")
        load_reward_function(str(reward))
        records.append(record())
    write_run_record(str(tmp_path / "step"), records[0])
    with pytest.raises(ConfigError, match=r"function.code was '\w{64} helpers \w{64}' and is '\w{64} helpers \w{64}'"):
        check_run_record(str(tmp_path / "step"), records[1])


@pytest.mark.parametrize("which", ["first", "last", "shape of none"])
def test_one_changed_weight_anywhere_is_another_embedder(model, tmp_path, which):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    assert model_digest(str(other)) == model_digest(str(model)) is not None
    file = other / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0 if which == "first" else -1]
    if which == "shape of none":
        weights = {key: value.clone() for key, value in reversed(list(weights.items()))}
        weights[name].view(-1)[-1] = torch.nextafter(weights[name].view(-1)[-1], torch.tensor(9.0))
    else:
        weights[name].view(-1)[-1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert model_digest(str(other)) != model_digest(str(model))


def test_a_part_far_inside_a_large_file_counts(tmp_path):
    """A digest of its first megabytes would not see a merged adapter."""
    for name, place in (("a", None), ("b", 9 << 20)):
        (tmp_path / name).mkdir()
        content = bytearray(10 << 20)
        if place is not None:
            content[place] = 1
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert model_digest(str(tmp_path / "a")) != model_digest(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model-00002-of-00002.safetensors", "adapter_config.json", "config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
        *("preprocessor_config.json", "processor_config.json"),
        # Of sentence-transformers: its prompts, and the longest text that it reads.
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    ],
)
def test_every_file_that_vectors_depend_on_counts(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "modules.json").write_text("[]")
    digests = [model_digest(str(tmp_path))]
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        digests.append(model_digest(str(tmp_path)))
    assert len(set(digests)) == 3


def test_files_of_no_account_do_not_count_and_those_of_modules_do(model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "notes.txt").write_text("mine")
    (other / "gone.json").symlink_to(tmp_path / "nowhere")
    assert model_digest(str(other)) == model_digest(str(model))
    (other / "modules.json").write_text("[]")
    before = model_digest(str(other))
    (other / "2_Dense").mkdir()
    (other / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    assert model_digest(str(other)) != before


def test_a_model_that_is_here_at_one_start_only_is_compared_by_its_path(record, model, tmp_path):
    saved = record()
    saved["embedrl.embedder"]["weights"] = None
    write_run_record(str(tmp_path), saved)
    check_run_record(str(tmp_path), record())
    moved = shutil.copytree(model, tmp_path / "moved")
    with pytest.raises(ConfigError, match="embedrl.embedder.path was"):
        check_run_record(str(tmp_path), record(f"embedrl.embedder.path={moved}"))


def test_a_hub_id_without_files_here_is_compared_by_name(record, tmp_path):
    write_run_record(str(tmp_path), record("embedrl.embedder.path=some/embedder"))
    check_run_record(str(tmp_path), record("embedrl.embedder.path=some/embedder"))
    with pytest.raises(ConfigError, match="embedder.path was 'some/embedder' and is 'other/embedder'"):
        check_run_record(str(tmp_path), record("embedrl.embedder.path=other/embedder"))


def test_a_checkpoint_without_record_is_refused(record, tmp_path):
    with pytest.raises(ConfigError, match="not written by an EG-RL trainer"):
        check_run_record(str(tmp_path), record())


def test_each_models_export_finds_its_own_record(tmp_path):
    train = ["train.enable=True", "train.lr=1e-4", "train.matryoshka_dims=[8]", "path=some/embedder"]
    run = ["actor_rollout_ref.model.path=some/reasoner", "data.train_batch_size=16", "embedrl.evidence.max_items=3"]
    config = compose([*run, "data.embedrl.family=qwen2_vl", *(f"embedrl.embedder.{one}" for one in train)])
    trainer = SimpleNamespace(
        config=config,
        embedrl=load_embedrl_config(config),
        run_record={"a": 1},
        global_steps=20,
        train_dataset=SimpleNamespace(pair_sources=["b", "a", "b"], family="qwen2_vl"),
        embedder_training=SimpleNamespace(last_hit1=0.9, averaged=False),
    )
    record_scores(str(tmp_path / "of_another_step"), {"hit@1 (all)": 0.1})
    write_records(trainer, str(tmp_path))
    (tmp_path / "actor").mkdir()
    assert read_record(tmp_path / "actor").scores == {}, "verl saves before it validates: nothing is known yet"
    record_scores(str(tmp_path), {"hit@1 (all)": 0.5})
    assert not (tmp_path / "of_another_step").exists(), "a step without checkpoint has no card"
    reasoner, embedder = read_record(tmp_path / "actor"), read_record(tmp_path / "embedder")
    assert (reasoner.stage, reasoner.step, reasoner.base_model) == ("egrl", 20, "some/reasoner")
    assert reasoner.settings["pairs_per_step"] == 8 and reasoner.settings["reward_function"].endswith("no_judge")
    assert reasoner.settings["evidence"]["max_items"] == 3
    prompt = [reasoner.settings[name] for name in ("family", "prompt_style", "few_shot", "image_max_tokens")]
    assert prompt == ["qwen2_vl", "paper", True, 768]
    assert reasoner.scores == {"hit@1 (all)": 0.5} and json.loads((tmp_path / RECORD).read_text()) == {"a": 1}
    assert (embedder.stage, embedder.base_model) == ("embedder", "some/embedder")
    assert embedder.settings["lr"] == 1e-4 and embedder.data == (("a", 1), ("b", 2))
    assert embedder.scores == {"hit@1 (anchors)": 0.9}
    trainer.embedder_training.averaged = True  # the average's Hit@1 says nothing of the weights in the checkpoint
    write_records(trainer, str(tmp_path))
    assert read_record(tmp_path / "embedder").scores == {}
