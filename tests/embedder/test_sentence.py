# SPDX-License-Identifier: Apache-2.0
"""A sentence-transformers model gives the Embedder's vectors if it has a profile, else those of its own `encode_query`
and `encode_document`; a row that it cannot embed has a reason and takes no other row along."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from embedrl_verl.config.schema import EmbedderConfig, SentenceConfig
from embedrl_verl.data.dataset import TCoTDataset
from embedrl_verl.embedder import Embedder, EmbedInput
from embedrl_verl.embedder.batching import NOT_FINITE
from embedrl_verl.embedder.sentence import (
    SentenceClient,
    SentenceModel,
    _SentenceActor,
    has_profile,
    refuse_media,
    start_sentence_actor,
)
from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.export.folder import export_checkpoint
from embedrl_verl.tcot import parse_tcot
from recipes.tiny_digits.models import build_tiny_model, build_tokenizer
from tests.embedder.inputs import LIMITS, TCOT, item, mixed_inputs, picture
from tests.embedder.inputs import section as embedder_section

KINDS = 12  # every combination of medium, T-CoT and evidence
PROMPTS = {"query": "find: ", "document": "kept: "}
Result = torch.Tensor | EmbedderError


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Any:
    """`exported(family)`: an exported tiny Embedder."""
    root = tmp_path_factory.mktemp("exported")

    def make(family: str) -> str:
        out = root / family / "out"
        if not out.exists():
            build_tiny_model(root / family / "embedder" / "huggingface", family=family)
            export_checkpoint(root / family / "embedder", out)
        return str(out)

    return make


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    """A text-only model with mean pooling, prompts for both sides and 64 tokens to read."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    root: Path = tmp_path_factory.mktemp("text")
    tokenizer = build_tokenizer(with_emb_token=False)
    tokenizer.padding_side = "right"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=80, **sizes)).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    transformer = Transformer(str(root / "bert"), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32)], prompts=PROMPTS, device="cpu")
    model.save(str(root / "model"))
    return str(root / "model")


def section(path: str, family: str = "qwen2_vl", **sentence: Any) -> EmbedderConfig:
    settings = SentenceConfig(n_gpus=0, **sentence)
    return embedder_section(path, family, backend="sentence_transformers", sentence=settings)


def embed(config: EmbedderConfig, inputs: Sequence[EmbedInput], side: str = "query") -> list[Result]:
    client = SentenceClient(config, max_frames=8)
    return SentenceModel(config, "cpu").embed([client.prepare(one, side) for one in inputs])


def vectors(results: Sequence[Result]) -> torch.Tensor:
    assert not [one for one in results if isinstance(one, EmbedderError)]
    return torch.stack(list(results))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_exported_embedder_gives_its_own_vectors_on_both_sides(family, exported):
    path = exported(family)
    # transformers gives what follows a video other positions in Qwen2.5-VL than vLLM and this package do.
    inputs = [one for one in mixed_inputs(KINDS) if family != "qwen2_5_vl" or not one.item.frames]
    expected = Embedder.from_pretrained(path, limits=LIMITS[family]).embed(inputs)
    for side in ("query", "target"):
        assert float((vectors(embed(section(path, family), inputs, side)) * expected).sum(dim=1).min()) >= 0.999
    assert float((expected[:-1] * expected[1:]).sum(dim=1).min()) < 0.99  # else anything would pass


def test_a_row_whose_tokens_were_counted_is_embedded_however_many_bytes_it_has(exported):
    path, words = exported("qwen2_vl"), "the heron stands in the water " * 300
    one = EmbedInput(item("what is it?", (picture(0),)), parse_tcot(TCOT.replace("Two digits", words)))
    embedder = Embedder.from_pretrained(path, limits=LIMITS["qwen2_vl"])
    assert len(embedder.processor.encode(one)) < 4096 < len(embedder.processor.prompt_text(one))
    (vector,) = vectors(embed(section(path), [one]))
    assert float(vector @ embedder.embed([one])[0]) >= 0.999


def test_another_model_reads_the_text_with_its_own_prompts(text_model):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(text_model, device="cpu")
    tcot = parse_tcot("<thinking>two {}</thinking>\n<rethink>yes</rethink>\n<answer>4 2</answer>")
    one = EmbedInput(item("a heron", instruction="Find it."), tcot)
    text = "Find it. a heron\n<thinking>two {}</thinking>\n<rethink>yes</rethink>\n<answer>4 2</answer>"

    def check(results: list[Result], expected: Any) -> None:
        assert torch.allclose(
            vectors(results)[0], torch.nn.functional.normalize(torch.tensor(expected), dim=0), atol=1e-5
        )

    config = section(text_model)
    assert not has_profile(config)
    check(embed(config, [one], "query"), model.encode_query(text))
    check(embed(config, [one], "target"), model.encode_document(text))
    check(embed(section(text_model, target_prompt="query"), [one], "target"), model.encode_query(text))
    check(embed(section(text_model, query_prompt=""), [one], "query"), model.encode(text, prompt=""))
    assert not torch.allclose(
        vectors(embed(config, [one], "query")), vectors(embed(config, [one], "target")), atol=1e-3
    )
    with pytest.raises(ConfigError, match="query_prompt must be one of the model's prompts .query, document"):
        embed(section(text_model, query_prompt="question"), [one])


def test_text_that_looks_like_an_address_is_text(text_model):
    first, second = (EmbedInput(item(f"https://example.org/{name}.png")) for name in ("a", "b"))
    assert vectors(embed(section(text_model), [first, second])).shape == (2, 32)


def test_a_row_with_media_fails_alone_in_a_text_only_model(text_model):
    rows = [EmbedInput(item("a")), EmbedInput(item("b", (picture(0),))), EmbedInput(item("c"), None, (picture(1),))]
    good, image, evidence = embed(section(text_model), rows)
    assert isinstance(good, torch.Tensor)
    assert str(image) == str(evidence) == "the sentence-transformers model takes text; the row has ['image']"


def test_the_tcot_is_read_however_long_the_text_is(text_model):
    def row(answer: str, text: str) -> EmbedInput:
        return EmbedInput(item(text), parse_tcot(TCOT.replace("4 2", answer)))

    long = "a word " * 200
    one, other, tail = vectors(embed(section(text_model), [row("4", long), row("5", long), row("4", long + "tail")]))
    assert not torch.allclose(one, other, atol=1e-4)  # the end of the T-CoT is within what the model reads
    assert torch.equal(one, tail)  # the end of the text is not
    (failed,) = embed(section(text_model), [row("4 " * 100, "a")])
    assert isinstance(failed, EmbedderError) and "longer than the 64 tokens" in str(failed)


def test_one_bad_row_takes_no_other_along(text_model, monkeypatch):
    config = section(text_model)
    model, client = SentenceModel(config, "cpu"), SentenceClient(config, max_frames=8)
    encode = model.model.encode_query

    def fails_on_b(inputs: list[dict], **options: Any) -> torch.Tensor:
        if any(one["text"] == "b" for one in inputs):
            raise RuntimeError("out of memory")
        return encode(inputs, **options) * (0.0 if inputs[0]["text"] == "c" else 1.0)

    monkeypatch.setattr(model.model, "encode_query", fails_on_b)
    a, b, c = model.embed([client.prepare(EmbedInput(item(name)), "query") for name in "abc"])
    assert isinstance(a, torch.Tensor)
    assert [str(b), str(c)] == ["the sentence-transformers model: RuntimeError", NOT_FINITE]


def test_rows_that_arrive_one_by_one_are_embedded_in_batches(text_model):
    config = section(text_model, batch_size=4)
    actor, client = _SentenceActor(config), SentenceClient(config, max_frames=8)
    sizes: list[int] = []
    embed_batch = actor._model.embed
    actor._model.embed = lambda rows: sizes.append(len(rows)) or embed_batch(rows)  # type: ignore[method-assign]
    rows = [client.prepare(EmbedInput(item(f"row {i}")), "query") for i in range(11)]

    async def run() -> list[Any]:
        return await asyncio.gather(*map(actor.embed, rows))

    results = asyncio.run(run())
    assert sum(sizes) == 11 and max(sizes) == 4 and len(sizes) <= 4
    expected = vectors(embed_batch(rows))
    assert torch.allclose(torch.stack([torch.from_numpy(vector) for vector, _ in results]), expected, atol=1e-5)


def test_a_folder_without_modules_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="no modules.json"):
        SentenceModel(section(str(checkpoint())), "cpu")
    with pytest.raises(ConfigError, match="profile must be auto or one of"):
        has_profile(dataclasses.replace(section("x"), profile="nothing"))


def test_data_with_media_that_the_model_does_not_take_are_refused_at_the_start():
    text = {"embedrl_item": {"images": [], "video": None}, "embedrl_row": "f:0", "embedrl_side": "query"}
    image = {"embedrl_item": {"images": ["a.png"], "video": None}, "embedrl_row": "f:1", "embedrl_side": "target"}
    columns = inspect.getsource(TCoTDataset.__getitem__)
    assert all(f'"{name}":' in columns for name in text)  # those of the data set
    refuse_media([text, text], ["text"], images=False, videos=False, path="m")
    refuse_media([text, image], ["text", "image"], images=True, videos=False, path="m")
    with pytest.raises(ConfigError, match=r"m takes text, and f:1 \(target\) has images"):
        refuse_media([text, image], ["text"], images=False, videos=False, path="m")


@pytest.mark.e2e
def test_agent_loops_find_the_runs_actor(text_model):
    import ray

    config = section(text_model)
    client = SentenceClient(config, max_frames=8)
    rows = [client.prepare(EmbedInput(item(f"row {i}")), "target") for i in range(5)]
    bad = client.prepare(EmbedInput(item("", (picture(0),))), "target")

    async def run() -> list[Any]:
        return await asyncio.gather(*map(client.embed, [*rows, bad]), return_exceptions=True)

    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        actor = start_sentence_actor(config)
        *results, failed = asyncio.run(run())
        takes = ray.get(actor.takes.remote())
    finally:
        ray.shutdown()
    assert torch.allclose(torch.stack(results), vectors(SentenceModel(config, "cpu").embed(rows)), atol=1e-5)
    assert isinstance(failed, EmbedderError) and "takes text" in str(failed)
    assert takes == (["text"], False, False)
