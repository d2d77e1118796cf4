# SPDX-License-Identifier: Apache-2.0
"""Reasoner and Embedder as one model: the vectors of training, a T-CoT beside each, and thinking where it is needed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedrl_verl.config.schema import EvidenceConfig
from embedrl_verl.data.media import LoadedItem
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.embedder import EmbedInput
from embedrl_verl.errors import ConfigError, DataError, EmbedderError, MediaError
from embedrl_verl.evaluation.metrics import hit_at_k
from embedrl_verl.export.record import TrainingRecord, write_record
from embedrl_verl.model import EmbedRLModel, Written, ask_for
from embedrl_verl.model.gate import ThinkGate, margins
from embedrl_verl.model.tcots import PairSide
from recipes.tiny_digits.canvas import HELD_OUT_SCANS
from recipes.tiny_digits.world import make_samples
from tests.embedder.inputs import picture
from tests.model.tiny_pair import LIMITS, make_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(folder: Path) -> EmbedRLModel:
    paths = [str(folder / name) for name in ("embedder", "reasoner")]
    return EmbedRLModel.from_pretrained(*paths, settings=LIMITS, device="cpu")


def test_vectors_are_those_of_the_embedder_with_the_tcots_that_stand_beside_them(model):
    inputs = ["a text", picture(0), {"text": "both", "image": picture(1)}, {"video": [picture(2)] * 3}]
    vectors, tcots = model.encode_query(inputs, prompt="Find it.", batch_size=3, return_tcots=True)
    assert vectors.shape == (4, 128) and vectors.dtype == np.float32 and all(tcots)
    asks = [ask_for(one, "query", instruction="Find it.") for one in inputs]
    written = model.reasoner.write(asks)
    assert [one.text for one in written] == tcots
    rows = [
        EmbedInput.with_tcot(ask.item, one.text, "qwen2_vl", EvidenceConfig(), one.seen_sizes)
        for ask, one in zip(asks, written, strict=True)
    ]
    assert np.allclose(model.embedder.embedder.embed(rows).numpy(), vectors, atol=1e-5)
    plain = model.encode_query(inputs, prompt="Find it.", think="never", convert_to_tensor=True)
    assert torch.allclose(plain, model.embedder.embedder.embed([EmbedInput(ask.item) for ask in asks]), atol=1e-5)


def test_given_tcots_have_the_vectors_of_written_ones_and_an_ask_is_asked_as_it_is(model):
    inputs = [ask_for(one, "query", instruction="Find it.") for one in ("a text", picture(0))]
    written = list(model.encodings(inputs, "query", batch_size=1))
    tcots = [Written(one.tcot, one.seen_sizes) for one in written]
    plain = EmbedRLModel(model.embedder, family="qwen2_vl")
    given = list(plain.encodings([*inputs, "no T-CoT"], "query", tcots=[*tcots, Written(None, problem="not there")]))
    assert all(torch.allclose(a.vector, b.vector, atol=1e-5) for a, b in zip(given, written, strict=False))
    assert given[1].seen_sizes == written[1].seen_sizes and len(written[1].seen_sizes) == 1
    assert given[2].vector is None and given[2].problem == "not there"


def test_a_single_input_has_a_single_vector_and_similarity_is_the_cosine(model):
    one, tcot = model.encode_document("a text", return_tcots=True)
    many = model.encode_document(["a text", "another"])
    assert one.shape == (128,) and isinstance(tcot, str) and np.allclose(one, many[0], atol=1e-6)
    assert torch.allclose(model.similarity(one, many), torch.tensor(many @ one)[None], atol=1e-6)
    assert model.similarity(one, many).shape == (1, 2)
    assert model.encode_document(ask_for("a text", "target")).shape == (128,)
    assert model.encode_document([]).shape == (0, 0)


def test_thinking_when_needed_is_for_queries_with_close_candidates_alone(model):
    queries = [f"query {i}" for i in range(6)]
    documents = model.encode_document([f"document {i}" for i in range(5)], convert_to_tensor=True)
    plain = model.encode_query(queries, think="never", convert_to_tensor=True)
    always = model.encode_query(queries, convert_to_tensor=True)
    margin = margins(plain @ documents.T)
    model.gate = ThinkGate(float(margin.median()) + 1e-9)
    found, tcots = model.encode_query(
        queries, think="when_needed", against=documents, batch_size=4, convert_to_tensor=True, return_tcots=True
    )
    thinks = margin < model.gate.threshold
    assert 0 < int(thinks.sum()) < 6 and [tcot is not None for tcot in tcots] == thinks.tolist()
    assert torch.allclose(found, torch.where(thinks[:, None], always, plain), atol=1e-5)
    with pytest.raises(ConfigError, match="against"):
        model.encode_query(queries, think="when_needed")
    model.gate = None
    with pytest.raises(ConfigError, match=r"fitted on validation pairs"):
        model.encode_query(queries, think="when_needed", against=documents)


def test_a_gate_thinks_least_among_those_of_the_highest_hit1():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        plain, thought = (torch.rand(20, 6, generator=generator) for _ in range(2))
        relevant = torch.zeros(20, 6, dtype=torch.bool)
        relevant[torch.arange(20), torch.randint(6, (20,), generator=generator)] = True
        plain[3] = plain[4]  # equal margins think together
        plain[5, 2] = torch.nan
        fit = ThinkGate.fit(plain, thought, relevant)

        def hit(gate: ThinkGate, plain: torch.Tensor = plain, thought: torch.Tensor = thought) -> tuple[float, float]:
            thinks = gate.thinks(plain)
            mixed = torch.where(thinks[:, None], thought, plain)
            return hit_at_k(mixed, relevant, 1), float(thinks.double().mean())  # noqa: B023

        assert hit(fit.gate) == pytest.approx((fit.gated, fit.share))
        others = [hit(ThinkGate(float(threshold))) for threshold in [-1.0, *margins(plain).nan_to_num(), 9.0]]
        assert fit.gated == pytest.approx(max(score for score, _ in others))
        assert fit.share <= min(share for score, share in others if score >= fit.gated - 1e-9) + 1e-9
        assert fit.never == pytest.approx(hit(ThinkGate(-1.0))[0]) and fit.always == pytest.approx(
            hit(ThinkGate(9.0))[0]
        )


def test_one_bad_input_is_named_and_the_others_have_their_vectors(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    inputs = ["fine", {"image": tmp_path / "broken.png"}, {"image": tmp_path / "gone.png"}, "", "fine too"]
    found = list(model.encodings(inputs, "query", batch_size=2))
    assert [one.vector is not None for one in found] == [True, False, False, False, True]
    assert "broken.png" in found[1].problem and "gone.png" in found[2].problem and "empty" in found[3].problem
    with pytest.raises(EmbedderError, match=r"input 1 has no vector: .*broken\.png"):
        model.encode_query(inputs)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (3, ConfigError, "an input must be a text, an image"),
        ({"txt": "a"}, ConfigError, "keys must be text, .* got 'txt'"),
        ({"image": 3}, ConfigError, "an image must be an image, a path or encoded bytes; got int"),
        ({"image": b"no"}, MediaError, "2 bytes"),
        ({"text": " "}, DataError, "empty"),
        ({"text": "half \ud800"}, DataError, "half of a surrogate pair"),
    ],
)
def test_what_is_no_input_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        ask_for(given, "query")


def test_kinds_and_instructions_are_those_of_pair_records(tmp_path):
    sample = make_samples("digits_page", 4, scans=HELD_OUT_SCANS, seed=1)[0].record
    picture(0).save(tmp_path / "a.png")
    assert ask_for(sample.query, "query").kind == "query_page"
    assert ask_for(Item("x", instruction="own"), "target", instruction="other").item.instruction == "own"
    side = PairSide(PairRecord("p", "s", "own", Item("x"), Item(video=Video(path="a.mp4"))), "query")
    assert ask_for(side.ask(), "query", instruction="i") == ("query_text_to_video", LoadedItem("x", "own", (), ()))
    assert ask_for("x", "target", instruction="i") == ("target_text", LoadedItem("x", "i", (), ()))
    assert ask_for({"video": [picture(0)] * 20}, "target").item.times.total == 20
    assert len(ask_for({"video": [picture(0)] * 20}, "target").item.frames) == 8
    assert ask_for({"image": "a.png"}, "query", media_root=tmp_path).kind == "query_image"
    with pytest.raises(MediaError, match="leaves the media root"):
        ask_for({"image": "../a.png"}, "query", media_root=tmp_path / "below")
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert ask_for(clear, "query").item.images[0].getpixel((0, 0)) == (255, 255, 255)


def test_thinking_without_a_reasoner_is_refused(folder):
    plain = EmbedRLModel.from_pretrained(str(folder / "embedder"), settings=LIMITS, device="cpu")
    assert plain.think == "never" and plain.encode_query("x").shape == (128,)
    with pytest.raises(ConfigError, match="needs a Reasoner"):
        plain.encode_query("x", think="always")
    with pytest.raises(ConfigError, match="prompts_like"):
        EmbedRLModel.from_pretrained(str(folder / "embedder"), "http://127.0.0.1:9", settings=LIMITS, device="cpu")


def test_pictures_of_any_mode_are_as_their_files_and_a_broken_one_is_an_input_that_fails(tmp_path):
    grey = Image.fromarray(np.full((28, 28), 32768, np.uint16))
    key = Image.new("RGB", (28, 28), (255, 0, 0))
    grey.save(tmp_path / "grey.png")
    key.save(tmp_path / "key.png", transparency=(255, 0, 0))
    for name in ("grey.png", "key.png"):
        file = ask_for({"image": tmp_path / name}, "query").item.images[0]
        opened = ask_for(Image.open(tmp_path / name), "query").item.images[0]
        assert opened.getpixel((3, 3)) == file.getpixel((3, 3)), name
    picture(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    with pytest.raises(MediaError, match="cannot be decoded"):
        ask_for(Image.open(tmp_path / "cut.png"), "query")


def test_vectors_of_double_precision_are_compared_too(model):
    vectors = model.encode_query(["a", "b"], think="never")
    assert torch.allclose(model.similarity(vectors.astype(np.float64), vectors).diagonal(), torch.ones(2), atol=1e-5)


def test_a_gate_counts_queries_without_a_margin_as_thinking():
    plain = torch.tensor([[torch.nan, torch.nan], [0.9, 0.1]])
    thought = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    fit = ThinkGate.fit(plain, thought, torch.eye(2, dtype=torch.bool)[[0, 0]])
    assert fit.gate.thinks(plain).tolist() == [True, False]
    assert (fit.share, fit.gated) == (0.5, 1.0)
    fit = ThinkGate.fit(plain, torch.full((2, 2), 0.5), torch.eye(2, dtype=torch.bool)[[0, 0]])
    assert (fit.share, fit.gated) == (0.5, 0.5) and fit.gate.thinks(plain).tolist() == [True, False]


def test_frames_of_the_reasoners_record_are_drawn(folder, tmp_path, monkeypatch):
    write_record(tmp_path, TrainingRecord(stage="egrl", settings={"max_frames": 4}))
    monkeypatch.setattr("embedrl_verl.model.loading.load_reasoner", lambda *_, **__: None)  # reads its own settings
    paths = [str(folder / "embedder"), str(tmp_path)]
    model = EmbedRLModel.from_pretrained(*paths, think="never", settings=LIMITS, device="cpu")
    assert model.max_frames == model.embedder.embedder.processor.limits.max_frames == 4
