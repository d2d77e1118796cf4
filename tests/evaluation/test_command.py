# SPDX-License-Identifier: Apache-2.0
"""`embedrl eval`: plain, before and after on any pair file, asked as in training, with every T-CoT kept."""

import json
from pathlib import Path

import pytest

from embedrl_verl import cli
from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import Item, PairRecord
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError
from embedrl_verl.evaluation.comparison import hit1_interval, source_table, verdict
from embedrl_verl.export.record import TrainingRecord, write_record
from embedrl_verl.model.loading import read_settings
from recipes.tiny_digits.models import build_tiny_model
from recipes.tiny_digits.world import SOURCES, write_world

LIMITS = ("image_min_tokens=4", "image_max_tokens=64", "frame_min_tokens=4", "frame_max_tokens=16")
SETTINGS = ["--set", *(f"embedrl.embedder.{one}" for one in LIMITS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, sft=4, train=4, heldout=4)
    build_tiny_model(folder / "embedder", seed=1)
    build_tiny_model(folder / "sft")
    media = dict(one.split("=") for one in LIMITS)
    settings = {name: int(value) for name, value in media.items()} | {"prompt_style": "compact", "few_shot": False}
    write_record(folder / "sft", TrainingRecord(stage="egrl", settings={**settings, "max_response_length": 6}))
    return folder


def evaluate(world: Path, out: Path, *words: str, file: str = "heldout.parquet") -> int:
    return cli.main(
        ["eval", str(world / file), "--embedder", str(world / "embedder"), "--out", str(out), "--device", "cpu", *words]
    )


def test_plain_before_and_after_stand_in_a_table_and_every_tcot_is_kept(world, tmp_path, capsys):
    reasoners = ["--reasoner", f"before={world / 'sft'}", "--reasoner", f"after={world / 'sft'}"]
    assert evaluate(world, tmp_path / "out", *reasoners, "--limit", "2", *SETTINGS) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(result["views"]) == ["raw", "before", "after"] and result["pairs"] == 2 * len(SOURCES)
    assert result["views"]["before"] == result["views"]["after"], "the same Reasoner twice must score the same"
    prompt = result["prompts"]["after"]
    assert (prompt["prompt_style"], prompt["max_response_length"], prompt["family"]) == ("compact", 6, "qwen2_vl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "tcots.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * len(SOURCES) * 2 and all(line["tcot"] for line in lines)
    printed = capsys.readouterr().out
    assert "before against raw" in printed and "digits_video" in printed and "well-formed 0.0%" in printed
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert evaluate(world, tmp_path / "out", *SETTINGS) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert evaluate(world, tmp_path / "out", "--overwrite", "--limit", "2", *SETTINGS) == 0
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["views"]) == ["raw"]


def test_settings_come_from_overrides_then_from_the_reasoners_record_then_from_the_defaults(world):
    overrides = ["data.embedrl.prompt_style=paper", "data.max_response_length=9", "embedrl.evidence.min_side=9"]
    settings = read_settings("some/embedder", overrides, "cpu")
    section = settings.embedrl
    assert (section.embedder.path, section.embedder.dtype, section.evidence.min_side) == ("some/embedder", "float32", 9)
    media, length = settings.asked(str(world / "sft"))
    assert (media.prompt_style, media.few_shot, media.image_max_tokens, length) == ("paper", False, 64, 9)
    media, length = settings.asked("some/reasoner")
    assert (media.prompt_style, media.few_shot, media.image_max_tokens, length) == ("paper", True, 768, 9)
    assert read_settings("some/embedder", [], "cpu").asked(str(world / "sft"))[1] == 6


def test_evidence_is_cut_as_in_the_reasoners_training_unless_an_override_says_otherwise(tmp_path):
    write_record(tmp_path, TrainingRecord(settings={"evidence": {"max_items": 0, "min_side": 7, "max_aspect": 50.0}}))
    settings = read_settings("some/embedder", ["embedrl.evidence.min_side=9"], "cpu")
    found = settings.evidence(str(tmp_path))
    assert (found.max_items, found.min_side, found.max_aspect) == (0, 9, 50.0)
    assert settings.evidence(None) == settings.evidence("some/reasoner") == settings.embedrl.evidence
    whole = ["embedrl.evidence={max_items: 3, min_side: 9}", "data.embedrl={max_frames: 5}"]
    settings = read_settings("some/embedder", whole, "cpu")
    assert settings.evidence(str(tmp_path)) == EvidenceConfig(max_items=3, min_side=9, max_aspect=50.0)
    assert settings.asked(str(tmp_path))[0].max_frames == 5
    write_record(tmp_path, TrainingRecord(settings={"evidence": [0]}))
    with pytest.raises(ConfigError, match=r"training\.json of .*: evidence must be an object; got \[0\]"):
        settings.evidence(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--reasoner", "raw=x"], 2, "names of their own, not raw; got 'raw=x'"),
        (["--reasoner", "a=x", "--reasoner", "a=y"], 2, "names of their own"),
        (["--reasoner", "nowhere/at/all"], 2, "the Reasoner: no such folder: nowhere/at/all"),
        (["--set", "embedrl.embedder.lr=1"], 2, "lr"),
        (["--set", "embedrl.embedder.profile=qwen3_vl_embedding"], 4, "qwen3_vl_embedding"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, code, message, world, tmp_path, capsys):
    assert evaluate(world, tmp_path / "out", *words, *([] if words[0] == "--set" else SETTINGS), "--limit", "2") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_are_no_pairs_and_media_that_are_not_there_are_told(world, tmp_path, capsys):
    pairs = list(read_pairs(world / "heldout.parquet"))[:4]
    write_pairs([*pairs, pairs[0]], tmp_path / "twice.parquet")
    assert evaluate(world, tmp_path / "out", file=str(tmp_path / "twice.parquet")) == 3
    assert "row 4" in capsys.readouterr().err
    item = pairs[0].query
    lost = PairRecord("lost", "digits_i2t", "Read it.", Item(images=("no.png",)), item, "")
    write_pairs([pairs[1], lost], tmp_path / "lost.parquet")
    words = ["--reasoner", str(world / "sft"), *SETTINGS]
    assert evaluate(world, tmp_path / "out", *words, file=str(tmp_path / "lost.parquet")) == 0
    printed = capsys.readouterr().out
    assert "ATTENTION: raw: 1 inputs without a vector, counted as misses:" in printed and "no.png" in printed
    assert "ATTENTION: sft: 1 inputs" in printed


def test_gains_are_paired_by_query_or_by_run_and_few_queries_have_no_interval():
    def views(**hits: list[int]) -> dict:
        scored = {name: {"hit1": {"a": sum(one) / len(one)}, "hits": {"a": one}} for name, one in hits.items()}
        return {name: one | {"hit1": one["hit1"] | {"all": one["hit1"]["a"]}} for name, one in scored.items()}

    runs = [views(raw=[1, 0, 0, 0] * 3, after=[1, 1, 1, 0] * 3), views(raw=[0] * 12, after=[1, 1, 0, 0] * 3)]
    assert hit1_interval(runs, "after", "raw", "a") == (0.5, 0.5, 0.5), "each run gains the same"
    one = hit1_interval(runs[:1], "after", "raw")
    assert one.mean == 0.5 and one.low < 0.5 < one.high
    for count, said in ((1, "too few queries"), (9, "too few queries"), (10, "[+1.00, +1.00] better")):
        lines = source_table([views(raw=[0] * count, after=[1] * count)], {"raw": "r", "after": "a"}, "raw", ["after"])
        assert lines[-1].split() == ["a", str(count), "0.000", "1.000", "+1.000", *said.split()]


def test_frames_are_those_of_the_reasoners_record_and_reasoners_that_differ_need_a_word(tmp_path):
    for name, frames in (("four", 4), ("twelve", 12)):
        write_record(tmp_path / name, TrainingRecord(stage="egrl", settings={"max_frames": frames}))
    four, twelve = str(tmp_path / "four"), str(tmp_path / "twelve")
    assert read_settings("some/embedder", [], "cpu").max_frames([twelve]) == 12
    assert read_settings("some/embedder", [], "cpu").max_frames([]) == 8
    assert read_settings("some/embedder", ["data.embedrl.max_frames=6"], "cpu").max_frames([four, twelve]) == 6
    with pytest.raises(ConfigError, match=r"4 and 12 frames .* data\.embedrl\.max_frames"):
        read_settings("some/embedder", [], "cpu").max_frames([four, twelve])


def test_a_checkpoints_huggingface_folder_is_asked_as_its_run_was(tmp_path):
    write_record(tmp_path / "global_step_4", TrainingRecord(stage="egrl", settings={"max_response_length": 77}))
    for name in ("actor/huggingface", "actor/model/huggingface", "actor"):
        folder = tmp_path / "global_step_4" / name
        folder.mkdir(parents=True, exist_ok=True)
        assert read_settings("some/embedder", [], "cpu").asked(str(folder))[1] == 77, name


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_computed(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert evaluate(world, tmp_path / "file" / "out", *SETTINGS) == 2
    assert "--out" in capsys.readouterr().err


def test_every_reasoner_is_looked_at_before_the_first_writes(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("embedrl_verl.evaluation.command.load_embedder", lambda *_: pytest.fail("it has begun"))
    words = ["--reasoner", f"a={world / 'sft'}", "--reasoner", "b=nowhere/at/all"]
    assert evaluate(world, tmp_path / "out", *words, *SETTINGS) == 2
    assert "the Reasoner: no such folder: nowhere/at/all" in capsys.readouterr().err


def test_the_interval_of_the_mean_over_sources_keeps_its_sources():
    views = {"x": {"hits": {"a": [1] * 10, "b": [1] * 200}, "hit1": {"all": 1.0}}}
    assert hit1_interval([views], "x") == pytest.approx((1.0, 1.0, 1.0)), "every query is hit in every resample"
    views["x"]["hits"]["a"].pop()
    assert verdict(hit1_interval([views], "x")) == "too few queries", "nine of one source decide half of the mean"
