# SPDX-License-Identifier: Apache-2.0
"""The pair as a model of mteb: its own mock tasks pass, and the vectors are those of `EmbedRLModel`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Video

from embedrl_verl.errors import ConfigError, DataError, EmbedderError
from embedrl_verl.evaluation.mteb_model import MtebModel, load, main, model_meta
from embedrl_verl.model import EmbedRLModel
from embedrl_verl.model.pair import Encoding
from tests.embedder.inputs import picture
from tests.model.tiny_pair import LIMITS, make_pair

if sys.version_info < (3, 11):
    pytest.skip("mteb 2.26 needs Python 3.11", allow_module_level=True)

import mteb
from mteb._create_dataloaders import create_dataloader
from mteb.mocks import MOCK_MIEB_TASK_GRID, MOCK_MVEB_TASK_GRID, MOCK_TASK_TEST_GRID
from mteb.mocks.mock_tasks import MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask, MockRetrievalTask
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType

IN_SPLIT = {"hf_split": "test", "hf_subset": "default"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"), longest=6)


@pytest.fixture(scope="module")
def paths(folder: Path) -> tuple[str, str]:
    return str(folder / "embedder"), str(folder / "reasoner")


@pytest.fixture(scope="module")
def pair(paths: tuple[str, str]) -> MtebModel:
    """As mteb loads it from its description."""
    return model_meta(*paths, settings=LIMITS).load_model(device="cpu")


@pytest.fixture(scope="module")
def plain(paths: tuple[str, str]) -> MtebModel:
    return model_meta(paths[0], settings=LIMITS).load_model(device="cpu")


def side_of(task, side):
    """One side of a mock task: the data set and what `encode` is told with its data loader."""
    task.load_data()
    rows = task.dataset["default"]["test"]["queries" if side == "query" else "corpus"]
    prompt_type = PromptType(side)
    inputs = create_dataloader(rows, task_metadata=task.metadata, prompt_type=prompt_type, batch_size=2)
    return rows, {"inputs": inputs, "task_metadata": task.metadata, "prompt_type": prompt_type, **IN_SPLIT}


def test_mtebs_own_mock_tasks_of_text_and_image_pass_through_the_embedder(plain):
    results = mteb.mock_run(plain)
    wanted = {task.metadata.name for task in (*MOCK_TASK_TEST_GRID, *MOCK_MIEB_TASK_GRID)}
    assert {name: results[name] for name in wanted if type(results[name]).__name__ != "TaskResult"} == {}


@pytest.mark.parametrize("task", [*MOCK_MIEB_TASK_GRID, MockRetrievalTask()], ids=lambda task: task.metadata.name)
def test_mtebs_own_mock_tasks_of_images_pass_through_the_pair(pair, task):
    # One of them has equal labels, whose correlation with anything is NaN: that it was scored is what counts.
    (result,) = mteb.evaluate(pair, [task], cache=None, show_progress_bar=False).task_results
    assert result.task_name == task.metadata.name and result.scores["test"]


def test_mtebs_own_mock_tasks_of_video_pass_without_another_decoder(plain):
    model = MtebModel(plain.model)
    model.mteb_model_meta = plain.mteb_model_meta.model_copy(update={"modalities": ["text", "image", "video"]})
    for task in MOCK_MVEB_TASK_GRID:
        (result,) = mteb.evaluate(model, [task], cache=None, show_progress_bar=False).task_results
        assert np.isfinite(result.get_score()), task.metadata.name


@pytest.mark.parametrize("task", [MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask, MockRetrievalTask])
def test_vectors_are_those_of_the_pair_on_the_same_inputs(pair, task):
    for side, encode in (("query", pair.model.encode_query), ("document", pair.model.encode_document)):
        rows, arguments = side_of(task(), side)
        # mteb reads a title before the text
        texts = [f"{row.get('title', '')} {row.get('text', '')}".strip() for row in rows]
        given = [{"image": row.get("image"), "text": text} for row, text in zip(rows, texts, strict=True)]
        prompt = pair.instruction(task.metadata, PromptType(side))
        assert bool(prompt) == (side == "query")
        found = pair.encode(**arguments)
        assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert np.allclose(found, encode(given, prompt=prompt), atol=1e-5)
        assert not np.allclose(found, encode(given, prompt=prompt, think="never"), atol=1e-3)


def test_text_and_image_of_one_input_are_embedded_together_and_pages_are_asked_about_as_pages(plain):
    rows = Dataset.from_dict({"id": ["a", "b"], "text": ["one", "two"], "image": [picture(0), picture(1)]})
    metadata = MockAny2AnyRetrievalT2ITask.metadata.model_copy(
        update={"category": "it2i", "type": "DocumentUnderstanding", "name": "Pages"}
    )
    inputs = create_dataloader(rows, task_metadata=metadata, prompt_type=PromptType.query)
    asked = []
    spy = SimpleNamespace(write=lambda asks: asked.extend(asks), family="qwen2_vl")
    with pytest.raises(TypeError):  # the spy writes nothing
        MtebModel(EmbedRLModel(plain.model.embedder, spy)).encode(
            inputs, task_metadata=metadata, prompt_type=PromptType.query, **IN_SPLIT
        )
    assert [(ask.kind, ask.item.text, len(ask.item.images)) for ask in asked] == [
        ("query_page", "one", 1),
        ("query_page", "two", 1),
    ]
    found = plain.encode(inputs, task_metadata=metadata, prompt_type=PromptType.query, **IN_SPLIT)
    prompt = plain.instruction(metadata, PromptType.query)
    given = [{"text": row["text"], "image": row["image"], "kind": "page"} for row in rows]
    assert np.allclose(found, plain.model.encode_query(given, prompt=prompt), atol=1e-5)


def test_a_second_run_takes_its_tcots_from_the_folder_and_no_other_question_does(paths, pair, tmp_path):
    _, arguments = side_of(MockAny2AnyRetrievalI2TTask(), "query")
    options = {"embedder": paths[0], "reasoner": paths[1], "settings": LIMITS, "tcots": str(tmp_path), "device": "cpu"}
    first = load("x/y", **options).encode(**arguments)
    file = tmp_path / "MockAny2AnyRetrievalI2T.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["id"], row["side"], row["split"]) for row in rows] == [
        ("q0", "query", "test"),
        ("q1", "query", "test"),
    ]
    file.write_text(file.read_text() + '{"id": "q')  # a writer was killed

    def refuse(asks):
        raise AssertionError(f"asked about {len(asks)}")

    second = load("x/y", **options)
    second.model.reasoner._reasoner = SimpleNamespace(write=refuse, family="qwen2_vl")
    assert np.array_equal(second.encode(**arguments), first) and np.allclose(first, pair.encode(**arguments), atol=1e-5)
    second.prompts["query"] = "Another instruction"
    with pytest.raises(AssertionError, match="asked about 2"):
        second.encode(**arguments)
    other = load("x/y", **{**options, "settings": [*LIMITS, "data.embedrl.prompt_style=paper"]})
    other.model.reasoner._reasoner = SimpleNamespace(write=refuse, family="qwen2_vl")
    with pytest.raises(AssertionError, match="asked about 2"):
        other.encode(**arguments)
    assert len(file.read_text().splitlines()) == 2
    file.write_text("{}\n")
    with pytest.raises(DataError, match="line 1: not a kept T-CoT"):
        load("x/y", **options).encode(**arguments)


def test_an_input_without_a_vector_is_an_error_that_names_it(plain, monkeypatch):
    task = MockRetrievalTask()
    task.load_data()
    rows = Dataset.from_dict({"id": ["good", "bad"], "text": ["words", " "]})
    inputs = create_dataloader(rows, task_metadata=task.metadata, prompt_type=PromptType.document)
    arguments = {"task_metadata": task.metadata, "prompt_type": PromptType.document, **IN_SPLIT}
    with pytest.raises(EmbedderError, match=r"MockRetrievalTask, default, test, document 'bad': .*empty"):
        plain.encode(inputs, **arguments)
    images = [{"bytes": b"no picture", "path": None}]
    pictures = Dataset.from_dict({"id": ["torn"], "image": images}).cast_column("image", Image())
    metadata = MockAny2AnyRetrievalT2ITask.metadata
    torn = create_dataloader(pictures, task_metadata=metadata, prompt_type=PromptType.document)
    with pytest.raises(EmbedderError, match=r"T2I, default, test, document 'torn': .*not a readable image"):
        plain.encode(torn, **{**arguments, "task_metadata": metadata})
    fine = create_dataloader(rows.select([0]), task_metadata=task.metadata, prompt_type=PromptType.document)
    for vector in (torch.full((4,), torch.nan), torch.zeros(4), torch.ones(4)):
        monkeypatch.setattr(plain.model, "encodings", lambda *_, vector=vector, **__: [Encoding(vector)])
        with pytest.raises(EmbedderError, match="'good': the vector must be finite and of length 1"):
            plain.encode(fine, **arguments)


def test_sound_is_refused_and_a_precision(plain):
    task = MockRetrievalTask()
    arguments = {"task_metadata": task.metadata, **IN_SPLIT}
    sound = torch.utils.data.DataLoader([{"audio": 1, "text": "a"}], collate_fn=lambda rows: {"audio": rows})
    with pytest.raises(ConfigError, match="these have audio"):
        plain.encode(sound, **arguments)
    with pytest.raises(ConfigError, match="precision must be float32; got 'int8'"):
        plain.encode([], precision="int8", **arguments)


def test_videos_are_read_as_in_training(plain, tmp_path):
    from mteb.mocks.mock_tasks.create_mock_samples import create_mock_video_bytes

    clips = create_mock_video_bytes(np.random.default_rng(0))
    rows = Dataset.from_dict({"id": ["a", "b"], "video": [{"bytes": clip, "path": None} for clip in clips]})
    rows = rows.cast_column("video", Video())
    metadata = MockAny2AnyRetrievalT2ITask.metadata.model_copy(
        update={"category": "t2v", "modalities": ["text", "video"]}
    )
    inputs = create_dataloader(rows, task_metadata=metadata, prompt_type=PromptType.document)
    found = plain.encode(inputs, task_metadata=metadata, prompt_type=PromptType.document, **IN_SPLIT)
    for name, clip in zip("ab", clips, strict=True):
        (tmp_path / name).write_bytes(clip)
    own = plain.model.encode_document([{"video": str(tmp_path / name)} for name in "ab"])
    assert np.allclose(found, own, atol=1e-5) and not np.allclose(found[0], found[1], atol=1e-3)


def test_instructions_are_the_tasks_own_and_documents_have_one_only_if_the_task_gives_it(plain):
    def of(prompt, side, **prompts):
        metadata = MockRetrievalTask.metadata.model_copy(update={"prompt": prompt})
        return MtebModel(plain.model, prompts).instruction(metadata, side and PromptType(side))

    assert of("Find it.", "query") == of("Find it.", None) == "Find it." and of("Find it.", "document") == ""
    both = {"query": "Q", "document": "D"}
    assert (of(both, "query"), of(both, "document"), of(both, None)) == ("Q", "D", "Q")
    assert of({"query": "Q"}, "document") == "" and of(None, "query") == "Retrieve text based on user query."
    assert of(both, "document", document="mine") == "mine" and of(both, "query", query="") == ""


def test_the_description_tells_what_is_known_and_its_revision_changes_with_what_changes_vectors(paths):
    alone, pair = model_meta(paths[0], settings=LIMITS), model_meta(*paths, settings=LIMITS, languages=["eng-Latn"])
    assert (alone.name, pair.name) == ("embedrl/embedder", "embedrl/embedder+reasoner")
    assert pair.n_parameters == 2 * alone.n_parameters > 1_500_000 and pair.embed_dim == 128
    assert pair.languages == ["eng-Latn"] and pair.training_datasets is None and pair.use_instructions
    assert {"text", "image"} <= set(pair.modalities) and pair.similarity_fn_name.value == "cosine"
    others = [
        alone,
        model_meta(*paths, settings=LIMITS, prompts={"query": "x"}),
        model_meta(paths[1], paths[1], settings=LIMITS),
        model_meta(paths[0], paths[0], settings=LIMITS),
    ]
    assert len({pair.revision, *(one.revision for one in others)}) == 5
    assert model_meta(*paths, settings=LIMITS, tcots="elsewhere").revision == pair.revision
    with pytest.raises(ConfigError, match="prompts must be by task name"):
        model_meta(*paths, prompts={"NoSuchTask": "x"})


def test_mtebs_command_line_runs_tasks_on_the_pair_and_keeps_results_by_model(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mteb, "get_tasks", lambda **_: [MockAny2AnyRetrievalI2TTask()])
    words = ["--embedder", paths[0], "--reasoner", paths[1], *(word for one in LIMITS for word in ("--set", one))]
    assert main([*words, "--tcots", "kept", "run", "-t", "any", "--output-folder", "out"]) == 0
    (file,) = tmp_path.glob("out/**/MockAny2AnyRetrievalI2T.json")
    assert "embedrl__embedder+reasoner" in str(file)
    (score,) = json.loads(file.read_text())["scores"]["test"]
    assert 0 <= score["main_score"] <= 1
    assert len((tmp_path / "kept" / "MockAny2AnyRetrievalI2T.jsonl").read_text().splitlines()) == 4
    assert main(["--embedder", str(tmp_path / "gone"), "run", "-t", "any"]) == 4
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_packaged_task_reads_its_own_layout_and_scores_what_the_vectors_give(pair, tmp_path, monkeypatch):
    # The task's own loader, prompt and metrics; only its address is another, since its pages lie on the hub.
    pages, queries = [picture(number) for number in range(7)], [f"page {number}" for number in range(5)]
    tables = {
        "corpus": Dataset.from_dict({"corpus-id": range(7), "image": pages}).cast_column("image", Image()),
        "queries": Dataset.from_dict({"query-id": range(5), "query": queries}),
        "qrels": Dataset.from_dict({"query-id": range(5), "corpus-id": range(1, 6), "score": [1] * 5}),
    }
    configs = []
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        configs.append({"config_name": name, "data_files": [{"split": "test", "path": f"{name}.parquet"}]})
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    task = mteb.get_task("VidoreArxivQARetrieval")
    monkeypatch.setitem(task.metadata.dataset, "path", str(tmp_path))
    (result,) = mteb.evaluate(pair, [task], cache=None, show_progress_bar=False).task_results
    prompt = pair.instruction(task.metadata, PromptType.query)
    found = pair.model.encode_query(queries, prompt=prompt)
    similarity = found @ pair.model.encode_document([{"image": page, "kind": "page"} for page in pages]).T
    ranks = [1 + int((row > row[number + 1]).sum()) for number, row in enumerate(similarity)]
    gains = [1 / np.log2(rank + 1) * (rank <= 5) for rank in ranks]
    assert prompt == "Find a screenshot that relevant to the user's question." and len(set(ranks)) > 1
    assert result.scores["test"][0]["ndcg_at_5"] == pytest.approx(np.mean(gains), abs=1e-4)


def test_it_is_an_encoder_to_mteb_and_thinking_when_needed_is_refused(pair, plain):
    assert isinstance(pair, EncoderProtocol) and pair.mteb_model_meta.name.startswith("embedrl/")
    one, two = (np.eye(3, dtype=np.float32)[[index]] for index in (0, 1))
    assert float(pair.similarity(one, one)) == 1 and float(pair.similarity_pairwise(one, two)[0]) == 0
    model = EmbedRLModel(plain.model.embedder)
    model.think = "when_needed"
    with pytest.raises(ConfigError, match="always or never with mteb"):
        MtebModel(model)
