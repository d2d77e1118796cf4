# SPDX-License-Identifier: Apache-2.0
"""Tasks of YAML tables: MMEB-V3's entries map to readers or say why not, and own data are read by the same schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.evaluation.benchmarks import mmeb_v2
from embedrl_verl.evaluation.benchmarks.runner import BenchmarkRun, read_task
from embedrl_verl.evaluation.benchmarks.tables import Tables, read_tables
from embedrl_verl.evaluation.benchmarks.task import Rules, Source
from embedrl_verl.model import EmbedRLModel
from tests.evaluation.benchmarks.world import FakeEmbedder, FakeReasoner, lines, make

TEXT = {"query_file": "t/queries.jsonl", "candidate_file": "t/corpus.jsonl"}
V3 = {
    "image.yaml": {
        "DocVQA": {"dataset_parser": "image_qa", "dataset_name": "DocVQA", "dataset_split": "test"}
        | {"image_root": "image-tasks/MMEB/", "eval_type": "local"},
        "Pairs": {"dataset_parser": "mcmr", "query_file": "/else/query.jsonl", "query_instruction": "x"},
    },
    "video.yaml": {
        "K700": {"dataset_parser": "video_classification", "dataset_name": "Kinetics-700", "num_frames": 8}
        | {"frame_root": "video-tasks/frames/video_cls/K700", "video_root": "x", "eval_type": "global"},
        "MomentSeeker": {"dataset_parser": "momentseeker", "clip_root": "", "eval_type": "local"}
        | {"frame_root": "video-tasks/frames/video_mret/MomentSeeker"},
    },
    "visdoc.yaml": {
        "ViDoSeek-page": {"dataset_parser": "vidore", "image_root": "visdoc-tasks/x", "eval_type": "global"},
        "ViDoRe_english": {"dataset_parser": "vidore", "image_root": "visdoc-tasks/x", "eval_type": "global"},
    },
    "text.yaml": {
        "text/InfoSearch/Tone": {"dataset_parser": "complex_text_retrieve", "data_path": "t", "eval_type": "global"}
        | {"subset_name": "InfoSearch/Tone", "qrels_file": "t/qrels.jsonl", **TEXT},
        "toolde/code/some": {"dataset_parser": "toolde", "subset_name": "code/some", "eval_type": "global"}
        | {"query_file": "tool/queries.parquet", "candidate_file": "tool/tools.parquet"},
    },
    "gui.yaml": {"GAE_q2t": {"dataset_parser": "gui", "image_root": "gui", "eval_type": "global"}},
    "cross.yaml": {"MSCOCO_t2i": {"dataset_parser": "mscoco_cmret", "data_path": "a.jsonl", "query_mod": ["I"]}},
    "audio.yaml": {"ESC": {"dataset_parser": "audio_cls", "audio_root": "a", "eval_type": "global"}},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in files.items():
        (folder / name).write_text(yaml.safe_dump(entries))
    return folder


def test_entries_of_v3_map_to_readers_and_the_others_say_why_not(tmp_path: Path) -> None:
    found = read_tables(write(tmp_path, V3))
    where = {name: (one.reader, one.repo, one.file, one.media, one.is_local) for name, one in found.tasks.items()}
    frames = "video-tasks/frames"
    assert where == {
        "DocVQA": ("image", "image-query", "", "image-tasks/MMEB", True),
        "K700": ("labels", "video-tasks/data", "k700.jsonl", f"{frames}/video_cls/K700", False),
        "MomentSeeker": (
            *("moment_seeker", "video-tasks/data", "momentseeker_1k6.jsonl"),
            *(f"{frames}/video_mret/MomentSeeker", True),
        ),
        "ViDoSeek-page": ("pages", "visdoc-tasks/data/ViDoSeek-page", "", "visdoc-tasks/x", False),
        "text/InfoSearch/Tone": ("texts", "", "", "", False),
        "toolde/code/some": ("texts", "", "", "", False),
    }
    assert {name: found.tasks[name].metric for name in ("text/InfoSearch/Tone", "toolde/code/some")} == {
        "text/InfoSearch/Tone": "ndcg_linear@5",
        "toolde/code/some": "hit@1",
    }
    assert {name: reason.split()[0] for name, reason in found.unsupported.items()} == {
        "Pairs": "candidates",
        "ViDoRe_english": "it",
        "GAE_q2t": "where",
        "MSCOCO_t2i": "dataset_parser",
        "ESC": "audio",
    }
    scores = dict.fromkeys(found.tasks, 0.5) | {"K700": 1.0}
    assert found.averages(scores) == {"image": 0.5, "video": 0.75, "visdoc": 0.5, "text": 0.5, "tool": 0.5}
    whole = Tables(found.tasks)
    assert whole.averages(scores)["All"] == pytest.approx(3.5 / 6), "nothing is left out"
    del scores["DocVQA"]
    assert not {"image", "All"} & set(whole.averages(scores))


def test_every_task_of_mmeb_v2_has_a_place_in_v3(tmp_path: Path) -> None:
    entry = {"dataset_parser": "vidore", "eval_type": "global", "image_root": "media"}
    found = read_tables(write(tmp_path, {"all.yaml": dict.fromkeys(mmeb_v2.TASKS, entry)}))
    assert len(found.tasks) == 78 and not found.unsupported
    assert {one.repo.split("/")[0] for one in found.tasks.values()} == {"image-query", "video-tasks", "visdoc-tasks"}


def test_texts_are_read_with_their_instruction_titles_and_grades(tmp_path: Path) -> None:
    lines(tmp_path / "t" / "queries.jsonl", [{"_id": "q", "text": "#0@2", "instruction_changed": "For experts:"}])
    lines(tmp_path / "t" / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"#{i}@9"} for i in range(3)])
    qrels = [{"query-id": "q", "corpus-id": f"d{i}", "score": i} for i in range(3)]
    lines(tmp_path / "t" / "qrels.jsonl", qrels)
    tool = tmp_path / "tool"
    tool.mkdir()
    asked = {"id": ["a", "b"], "query": ["#1@1", "#0@0"], "instruction": ["Find a tool.", ""]}
    labels = ['[{"id": "d1", "relevance": 1}]', '["d0"]']
    pd.DataFrame(asked | {"labels": labels}).to_parquet(tool / "queries.parquet")
    pd.DataFrame({"id": ["d0", "d1"], "documentation": ['{"name": "#0@0"}', "#1@1"]}).to_parquet(tool / "tools.parquet")
    tasks = read_tables(write(tmp_path / "tables", V3)).tasks
    text = read_task(tasks["text/InfoSearch/Tone"], Source(tmp_path), Rules())
    item = text.queries[0].item()
    assert (item.instruction, item.text, text.queries[0].grades) == ("For experts:", "#0@2", {"d1": 1, "d2": 2})
    assert text.items["d2"]().text == "T\n#2@9" and list(text.items) == ["d0", "d1", "d2"]
    names = ["text/InfoSearch/Tone", "toolde/code/some"]
    model = EmbedRLModel(FakeEmbedder(), FakeReasoner())
    run = BenchmarkRun("mmeb_v3", lambda: model, Source(tmp_path), tmp_path / "out", tasks=tasks, tcots="write")
    cells = {name: file["cells"] for name, file in run.run(names).items()}
    assert cells["toolde/code/some"]["plain-plain"]["score"] == 1.0
    assert cells["text/InfoSearch/Tone"]["plain-plain"]["score"] < cells["text/InfoSearch/Tone"]["tcot-plain"]["score"]
    assert (tmp_path / "out" / "toolde" / "code" / "some.json").is_file()
    lines(tmp_path / "t" / "corpus.jsonl", [{"_id": "d", "text": ""}])
    with pytest.raises(DataError, match=r"t/corpus\.jsonl, row 0 must have one of the columns text, content"):
        read_task(tasks["text/InfoSearch/Tone"], Source(tmp_path), Rules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_type": "both"}, "eval_type must be local or global; got 'both'"),
        ({"image_rot": "media"}, "keys must be .*; got image_rot"),
        ({"image_root": "/else"}, "image_root must be relative to the data root"),
        ({"kind": "photo"}, "kind must be page"),
        ({"metric": "hit@3"}, "kind must be page, and metric one of hit@1"),
        ({"subset_name": "../mine"}, "subset_name must be relative to the data root"),
    ],
)
def test_a_wrong_entry_is_refused_by_file_task_and_key(change: dict[str, str], message: str, tmp_path: Path) -> None:
    entry = {"dataset_parser": "image_i2t", "data_path": "rows", "image_root": "media", "eval_type": "local"}
    with pytest.raises(ConfigError, match=rf"own\.yaml: mine: {message}"):
        read_tables(write(tmp_path, {"own.yaml": {"mine": {**entry, **change}}}) / "own.yaml")


def test_one_name_is_one_task(tmp_path: Path) -> None:
    entry = V3["image.yaml"]["DocVQA"]
    folder = write(tmp_path, {"a.yaml": {"DocVQA": entry}, "b.yaml": {"DocVQA": entry}})
    assert list(read_tables(folder / "a.yaml", folder / "b.yaml").tasks) == ["DocVQA"]
    write(tmp_path, {"b.yaml": {"DocVQA": {**entry, "eval_type": "global"}}})
    with pytest.raises(ConfigError, match=r"b\.yaml: names of tasks must be unique; DocVQA is another task"):
        read_tables(folder)


def test_files_without_tasks_are_refused(tmp_path: Path) -> None:
    for text, message in (("a: [", "must be a YAML file"), ("a: b", "by name"), ("{}", "it has none at all")):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_tables(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match="GAE_q2t: where its rows lie"):
        read_tables(write(tmp_path / "gui", {"gui.yaml": V3["gui.yaml"]}))


def test_a_limited_run_has_the_first_queries_and_says_so(tmp_path: Path) -> None:
    task = mmeb_v2.TASKS["DocVQA"]
    make(tmp_path, task)
    embedder = FakeEmbedder()
    run = BenchmarkRun(
        "mmeb_v2", lambda: EmbedRLModel(embedder), Source(tmp_path), tmp_path / "out", rules=Rules(limit=1)
    )
    stamp = run.run(["DocVQA"])["DocVQA"]["stamp"]
    assert stamp["queries"] == "1 of 1000" and stamp["candidate_count"].startswith("3 of")
    assert embedder.seen == 1 + 3


def own(folder: Path, rows: list[dict[str, Any]], **entry: str) -> Any:
    """The data of an entry over these rows, whose media lie in the data root itself."""
    lines(folder / "rows" / "mine" / "test.jsonl", rows)
    given = {"data_path": "rows", "subset_name": "mine", "image_root": ".", "eval_type": "global", **entry}
    task = read_tables(write(folder / "t", {"own.yaml": {"mine": given}})).tasks["mine"]
    return read_task(task, Source(folder), Rules())


ROW = {"qry_inst": "", "qry_text": "", "qry_img_path": "q.png", "tgt_inst": "", "tgt_img_path": []}


def test_instructions_of_an_entry_are_of_rows_that_bring_none(tmp_path: Path) -> None:
    said = {"instruction": "Find the bird.", "target_instruction": "A bird."}
    rows = [{**ROW, "tgt_text": ["heron"]}, {**ROW, "tgt_text": ["ibis"], "qry_inst": "Name it."}]
    data = own(tmp_path / "a", rows, dataset_parser="image_i2t", **said)
    first, second = (query.item() for query in data.queries)
    assert (first.images, first.instruction, second.instruction) == (("q.png",), "Find the bird.", "Name it.")
    assert data.items["heron"]().instruction == "A bird."
    pictures = [{**ROW, "tgt_text": [], "tgt_img_path": ["a.png"]}]
    data = own(tmp_path / "b", pictures, dataset_parser="image_i2i_vg", **said)
    assert data.items["a.png"]().instruction == "A bird."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tgt_text": "heron"}, "mine, row 0: tgt_text must be a list; got 'heron'"),
        ({"tgt_text": []}, "mine, row 0: tgt_text or tgt_img_path must have a target"),
    ],
)
def test_rows_without_a_list_of_targets_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        own(tmp_path, [{**ROW, **row}], dataset_parser="image_i2t")


@pytest.mark.parametrize("parser", ["msrvtt", "vidore", "complex_text_retrieve"])
def test_rows_without_candidates_of_their_own_are_never_local(parser: str, tmp_path: Path) -> None:
    entry = {"dataset_parser": parser, "data_path": "rows", "eval_type": "local", **TEXT}
    with pytest.raises(ConfigError, match="mine: its eval_type is local, and rows of this parser have no candidates"):
        read_tables(write(tmp_path, {"own.yaml": {"mine": entry}}))


@pytest.mark.parametrize("name", ["./run", "a//b", "."])
def test_a_name_that_is_no_plain_path_is_refused(name: str, tmp_path: Path) -> None:
    entry = {"dataset_parser": "image_i2t", "data_path": "rows", "eval_type": "local"}
    with pytest.raises(ConfigError, match="becomes the name of its score file"):
        read_tables(write(tmp_path, {"own.yaml": {name: entry}}))


def test_qrels_have_numbers_and_ids_of_queries_and_a_title_is_a_text(tmp_path: Path) -> None:
    lines(tmp_path / "t" / "queries.jsonl", [{"_id": "q", "text": "a"}])
    lines(tmp_path / "t" / "corpus.jsonl", [{"_id": "d", "title": "T", "text": ""}, {"_id": "e", "text": "b"}])
    entry = {"dataset_parser": "complex_text_retrieve", "eval_type": "global", "qrels_file": "t/qrels.jsonl", **TEXT}
    task = read_tables(write(tmp_path / "own", {"own.yaml": {"mine": entry}})).tasks["mine"]

    def read(*rows: tuple[str, Any]) -> Any:
        lines(tmp_path / "t" / "qrels.jsonl", [{"query-id": one, "corpus-id": "d", "score": two} for one, two in rows])
        return read_task(task, Source(tmp_path), Rules())

    data = read(("q", 2), ("q", 1))
    assert data.queries[0].grades == {"d": 2.0} and data.items["d"]().text == "T"
    with pytest.raises(DataError, match="no query has one. Do ids of queries and of qrels match"):
        read(("q1", 1))
    with pytest.raises(DataError, match=r"qrels\.jsonl, row 1: score must be a number; got None"):
        read(("q", 1), ("q", None))


@pytest.mark.parametrize("unused", [["", ""], []])
def test_the_row_of_the_documentation_is_a_text_against_its_pictures(unused: list[str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (row,) = (json.loads(block.partition("```")[0]) for block in page.split("```json\n")[1:])
    assert row["tgt_text"] == ["", ""]
    lines(tmp_path / "rows" / "mine" / "test.jsonl", [row | {"tgt_text": unused}])
    entry = yaml.safe_load(page.split("```yaml\n")[1].partition("```")[0])["mine"] | {"dataset_parser": "image_t2i"}
    tasks = read_tables(write(tmp_path, {"own.yaml": {"mine": entry}}) / "own.yaml").tasks
    data = read_task(tasks["mine"], Source(tmp_path), Rules())
    (query,), asked = data.queries, data.queries[0].item()
    assert (asked.text, asked.images, query.grades) == ("a red bicycle", (), {"bikes/red.png": 1})
    assert [make().images for make in data.items.values()] == [("media/bikes/red.png",), ("media/bikes/blue.png",)]
