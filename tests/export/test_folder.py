# SPDX-License-Identifier: Apache-2.0
"""Which folder is exported, what may be replaced, and what the exported folder and its card say."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from embedrl_verl import cli
from embedrl_verl.errors import ConfigError
from embedrl_verl.export import folder as folder_module
from embedrl_verl.export.checkpoint import find_checkpoint
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.export.record import TrainingRecord, public_record, public_text, read_record, write_record

RECORD = {
    "stage": "contrastive",
    "step": 400,
    "base_model": "/somewhere/m/models/Qwen2-VL-2B",
    "data": ["/data/sets/train.parquet", {"source": "birds", "pairs": 1200}, {"source": "fish"}],
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
        assert (found.folder.name, found.kind, found.storage, found.step) == (name, kind, "files", 3)


def test_the_kind_is_told_by_training_json_or_asked_for(model_copy, tmp_path):
    folder = model_copy().rename(tmp_path / "step" / "weights")
    with pytest.raises(ConfigError, match="add --kind"):
        find_checkpoint(folder)
    for stage, kind in (("contrastive", "embedder"), ("egrl", "reasoner")):
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
    (tmp_path / "step" / "embedder" / "huggingface" / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="image processor"):
        export_checkpoint(tmp_path / "step" / "embedder", tmp_path / "out", kind="reasoner")


def test_what_exists_is_replaced_only_with_force_and_only_a_model(saved_model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["export", str(saved_model()), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "wrote the embedder to" in capsys.readouterr().out
    (out / "mine.txt").touch()
    assert cli.main(arguments) == 2
    assert f"ConfigError: --out {out} exists and is not empty" in capsys.readouterr().err
    assert (out / "mine.txt").exists()
    assert cli.main([*arguments, "--force"]) == 0
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="--force replaces only a folder with a model"):
        export_checkpoint(saved_model(), tmp_path / "notes", force=True)
    with pytest.raises(ConfigError, match="is the checkpoint or a folder around it"):
        export_checkpoint(saved_model(), saved_model().parent, force=True)


@pytest.mark.parametrize("name", ["render_card", "replace"])
def test_a_failure_at_the_end_leaves_the_old_export_alone(name, saved_model, tmp_path, monkeypatch):
    out = export_checkpoint(saved_model(), tmp_path / "out").folder
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    replace = os.replace

    def fail(*given: object, **facts: object) -> None:
        if name == "replace" and Path(str(given[0])).name != "new":
            return replace(*given)
        raise OSError("disk full")

    monkeypatch.setattr(folder_module if name == "render_card" else folder_module.os, name, fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(saved_model(), out, force=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_processor_template_and_generation_config_are_those_of_the_checkpoint(model_copy, tmp_path):
    source = model_copy() / "huggingface"
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name_or_path": str(tmp_path)}))
    out = export_checkpoint(source.parent, tmp_path / "out").folder
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_sentence_transformers_is_told_the_sizes_that_the_embedder_was_trained_with(model_copy, tmp_path):
    folder = model_copy()
    sizes = {"image_min_tokens": 4, "image_max_tokens": 64, "max_text_tokens": 300}
    (folder / "training.json").write_text(json.dumps({"settings": sizes}))
    out = export_checkpoint(folder, tmp_path / "out").folder
    told = json.loads((out / "sentence_bert_config.json").read_text())["processing_kwargs"]
    assert told["image"]["size"] == {"shortest_edge": 4 * 28**2, "longest_edge": 64 * 28**2}
    assert "4 to 64 visual tokens" in (out / "README.md").read_text()


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
        "- Base model: Qwen2-VL-2B\n- Stage: contrastive\n- Step: 400\n",
        "- Data: train.parquet\n- Data: birds (1,200 pairs)\n- Data: fish\n",
        "| learning_rate | 1e-05 |",
        "| media | birds |",
        "| note | from y.json \\| two lines |",
        "| hit@1 | 0.8125 |\n| loss | 2 |",
        "vectors of 128 numbers",
        'SentenceTransformer("birds-embedder")',
        'LLM("birds-embedder", runner="pooling", convert="embed")',
        "<|im_start|>assistant\\n<emb>",
        "128 to 768 visual tokens",
    ):
        assert part in text, part
    for path in ("/home", "/data", "/mnt", "~/", str(tmp_path)):
        assert path not in card + (tmp_path / "birds-embedder" / "training.json").read_text()


@pytest.mark.parametrize("kind", ["reasoner", "embedder"])
def test_the_python_of_a_card_runs_as_it_is_pasted(kind, saved_model, tmp_path, monkeypatch, capsys):
    """But for vLLM's blocks, whose engine takes half a minute to start (tests/export/test_vectors.py)."""
    settings = {
        "prompt_style": "compact",
        "few_shot": False,
        "image_min_tokens": 1,
        "image_max_tokens": 64,
        "max_response_length": 12,
    }
    folder = shutil.copytree(saved_model(), tmp_path / "step" / kind)
    (folder / "training.json").write_text(json.dumps({"stage": "egrl", "step": 3, "settings": settings}))
    export_checkpoint(folder, tmp_path / "model", kind=kind)
    monkeypatch.chdir(tmp_path)
    card, names = Path("model/README.md").read_text(), {}
    blocks = [block for block in re.findall("```python\n(.*?)```", card, re.DOTALL) if "vllm" not in block]
    for block in blocks:
        exec(block, names)
    if kind == "embedder":
        assert len(blocks) == 4 and names["vector"].shape == names["query"].shape == (1, 128)
        assert capsys.readouterr().out.startswith("tensor")
    else:
        assert 'style="compact", few_shot=False' in card and "image_min_tokens=1, image_max_tokens=64" in card
        assert names["inputs"]["input_ids"].shape[1] < names["tokens"].shape[1] and len(blocks) == 1
        assert "TCoT(" in capsys.readouterr().out
        assert read_record(Path("model")).settings == settings


def test_the_card_of_an_unknown_run_invents_nothing(saved_model, tmp_path):
    card = (export_checkpoint(saved_model(), tmp_path / "out", kind="reasoner").folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front and front["pipeline_tag"] == "image-text-to-text"
    for what in ("Base model", "Stage", "Step", "Data", "Settings"):
        assert f"- {what}: unknown\n" in card
    assert "The scores of this model are unknown" in card and "|---|" not in card
    assert not (tmp_path / "out" / "modules.json").exists()
    named = export_checkpoint(saved_model(), tmp_path / "named", base_model="Qwen/Qwen2-VL-2B-Instruct").folder
    assert "base_model: Qwen/Qwen2-VL-2B-Instruct\n" in (named / "README.md").read_text()


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
        ("0.5/0.5 split, 1/3", "0.5/0.5 split, 1/3"),
        (0.1, "0.1"),
        (["/a/b", 1], "['b', 1]"),
    ],
)
def test_public_text_keeps_the_last_component_of_paths(text, public):
    assert public_text(text) == public


def test_a_record_is_read_back_from_the_checkpoint_or_the_step_folder(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    record = read_record(tmp_path / "actor")
    assert record.data == ("/data/sets/train.parquet", ("birds", 1200), ("fish", None)) and record.step == 400
    write_record(tmp_path / "again" / "embedder", record)
    assert read_record(tmp_path / "again" / "embedder") == record
    assert read_record(tmp_path / "again") == record, "the parent's"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the file: Input should be an object; got []"),
        ("{", "the file: Invalid JSON"),
        ('{"step": "4"}', "step: Input should be a valid integer; got '4'"),
        ('{"data": [1]}', "data.0"),
        ('{"scores": {"hit": "high"}}', "scores.hit: Input should be a valid number; got 'high'"),
    ],
)
def test_a_training_json_of_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_record(tmp_path)
    assert f"training.json: {message}" in str(refused.value)


def test_no_machine_path_is_published_however_deep_a_setting_is():
    settings = {"files": ["/data/me/a.parquet"], "of": {"model": "/data/me/b"}, "lr": 1e-5, "dims": [64, 128]}
    public = public_record(TrainingRecord(settings=settings)).settings
    assert public == {"files": ["a.parquet"], "of": {"model": "b"}, "lr": 1e-5, "dims": [64, 128]}
