# SPDX-License-Identifier: Apache-2.0
"""Which folder is exported, what may be replaced, and what the exported folder and its card say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from embedrl_verl import cli
from embedrl_verl.errors import ConfigError
from embedrl_verl.export import folder as folder_module
from embedrl_verl.export.checkpoint import find_checkpoint
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.export.record import public_text, read_record

RECORD = {
    "stage": "contrastive",
    "step": 400,
    "base_model": "/somewhere/m/models/Qwen2-VL-2B",
    "data": ["/data/sets/train.parquet", {"source": "birds", "pairs": 1200}],
    "settings": {"learning_rate": 1e-5, "media": "~/media/birds", "note": "from /mnt/x/y.json | two\nlines"},
    "scores": {"hit@1": 0.8125, "loss": 2},
}


def test_a_step_folder_holds_an_actor_and_an_embedder(saved_model, tmp_path):
    step = tmp_path / "global_step_3"
    shutil.copytree(saved_model(), step / "actor")
    assert find_checkpoint(step).kind == "reasoner"
    with pytest.raises(ConfigError, match="holds no embedder, only: actor"):
        find_checkpoint(step, "embedder")
    shutil.copytree(saved_model(), step / "embedder")
    with pytest.raises(ConfigError, match="holds an actor and an embedder; say which"):
        find_checkpoint(step)
    for kind, name in (("reasoner", "actor"), ("embedder", "embedder")):
        found = find_checkpoint(step, kind)
        assert (found.folder.name, found.kind, found.storage) == (name, kind, "files")


def test_the_kind_is_told_by_training_json_or_asked_for(model_copy, tmp_path):
    folder = model_copy().rename(tmp_path / "step" / "weights")
    with pytest.raises(ConfigError, match="add --kind"):
        find_checkpoint(folder)
    for stage, kind in (("contrastive", "embedder"), ("sft", "reasoner")):
        (folder.parent / "training.json").write_text(json.dumps({"stage": stage}))
        assert find_checkpoint(folder).kind == kind
    assert find_checkpoint(folder, "embedder").kind == "embedder"


def test_what_is_no_checkpoint_is_refused(model_copy, tmp_path):
    with pytest.raises(ConfigError, match="a checkpoint is a folder"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no weights"):
        find_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "model_world_size_1_rank_0.pt").touch()
    with pytest.raises(ConfigError, match="has no huggingface/config.json"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(ConfigError, match="kind must be embedder or reasoner"):
        find_checkpoint(model_copy(), "judge")


def test_a_folder_without_processor_is_refused(model_copy, tmp_path):
    folder = model_copy()
    (folder / "huggingface" / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="processor"):
        export_checkpoint(folder, tmp_path / "out", kind="reasoner")


def test_what_exists_is_replaced_only_with_force_and_only_a_model(saved_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_checkpoint(saved_model(), out)
    (out / "mine.txt").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_checkpoint(saved_model(), out)
    assert (out / "mine.txt").exists()
    export_checkpoint(saved_model(), out, force=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="--force replaces only a folder with a model"):
        export_checkpoint(saved_model(), tmp_path / "notes", force=True)
    with pytest.raises(ConfigError, match="is the checkpoint or a folder around it"):
        export_checkpoint(saved_model(), saved_model().parent, force=True)


def test_a_failure_at_the_end_leaves_the_old_export_alone(saved_model, tmp_path, monkeypatch):
    out = export_checkpoint(saved_model(), tmp_path / "out").folder
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    def fail(facts: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(folder_module, "render_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(saved_model(), out, force=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_processor_template_and_generation_config_are_those_of_the_checkpoint(saved_model, tmp_path):
    source, out = saved_model() / "huggingface", export_checkpoint(saved_model(), tmp_path / "out").folder
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert GenerationConfig.from_pretrained(out).eos_token_id == GenerationConfig.from_pretrained(source).eos_token_id
    assert AutoProcessor.from_pretrained(out).image_processor is not None
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {0o644 & ~_umask() | 0o600}


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_card_of_an_embedder_says_what_the_run_says_without_paths(model_copy, tmp_path):
    folder = model_copy()
    (folder / "training.json").write_text(json.dumps(RECORD))
    card = (export_checkpoint(folder, tmp_path / "birds-embedder").folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Qwen2-VL-2B",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["embedrl-verl", "multimodal", "retrieval", "sentence-transformers", "feature-extraction"],
    }
    for part in (
        "# birds-embedder",
        "- Base model: Qwen2-VL-2B\n",
        "- Stage: contrastive\n",
        "- Step: 400\n",
        "- Data: train.parquet\n",
        "- Data: birds (1,200 pairs)\n",
        "| learning_rate | 1e-05 |",
        "| media | birds |",
        "| note | from y.json \\| two lines |",
        "| hit@1 | 0.8125 |",
        "| loss | 2 |",
        "vectors of 128 numbers",
        'SentenceTransformer("birds-embedder")',
        'LLM("birds-embedder", runner="pooling", convert="embed")',
        "<|im_start|>assistant\\n<emb>",
        "128 to 768 visual tokens",
    ):
        assert part in text, part
    for path in ("/home", "/data", "/mnt", "~/", str(tmp_path)):
        assert path not in card


def test_the_card_of_an_unknown_run_invents_nothing(saved_model, tmp_path):
    card = (export_checkpoint(saved_model(), tmp_path / "out", kind="reasoner").folder / "README.md").read_text()
    front, text = yaml.safe_load(card.split("---\n")[1]), card
    assert "base_model" not in front and front["pipeline_tag"] == "image-text-to-text"
    for what in ("Base model", "Stage", "Step", "Data", "Settings"):
        assert f"- {what}: unknown\n" in text
    assert "The scores of this model are unknown" in text and "|---|" not in text
    assert not (tmp_path / "out" / "modules.json").exists()


def test_the_named_base_model_wins_and_the_step_folder_tells_the_step(saved_model, tmp_path):
    step = tmp_path / "global_step_12"
    shutil.copytree(saved_model(), step / "embedder")
    card = (
        export_checkpoint(step, tmp_path / "out", base_model="Qwen/Qwen2-VL-2B-Instruct").folder / "README.md"
    ).read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert "- Step: 12\n" in card


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        ("/data/a b/train set.parquet", "train set.parquet"),
        ("./models/tiny/", "tiny"),
        ("file:///data/x.parquet", "x.parquet"),
        ("C:\\data\\x.parquet", "x.parquet"),
        ("train=/data/x.parquet,val=/data/y.parquet", "train=x.parquet,val=y.parquet"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("data/train.parquet", "train.parquet"),
        ("runs/seed0/embedder", "embedder"),
        ("x" * 5000, "x" * 5000),
        ("0.5/0.5 split, 1/3", "0.5/0.5 split, 1/3"),
        (0.1, "0.1"),
        (["/a/b", 1], "['b', 1]"),
    ],
)
def test_public_text_keeps_the_last_component_of_paths(text, public):
    assert public_text(text) == public


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be a JSON object; got list"),
        ("{", "must be a JSON object"),
        ('{"step": "4"}', "step must be of type int; got '4'"),
        ('{"data": [1]}', "an entry of data must be"),
        ('{"scores": {"hit": "high"}}', "the score hit must be a number; got 'high'"),
    ],
)
def test_a_training_json_of_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_record(tmp_path)
    assert message in str(refused.value)


def test_the_command_exports_and_says_what(saved_model, tmp_path, capsys):
    arguments = ["export", str(saved_model()), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert "wrote the embedder to" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "ConfigError: --out" in capsys.readouterr().err


def test_the_exported_folder_names_no_folder_of_this_machine(model_copy, tmp_path):
    folder = model_copy()
    file = folder / "huggingface" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name_or_path": str(tmp_path)}))
    out: Path = export_checkpoint(folder, tmp_path / "out").folder
    for path in out.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
