# SPDX-License-Identifier: Apache-2.0
"""Vectors that agent loops left in the queue are read as they are, and what is no vector is a failed row."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch
from tensordict import TensorDict

from embedrl_verl.config.schema import EmbedderConfig, EmbedderServerConfig, SentenceConfig, parse_embedrl_section
from embedrl_verl.embedder import EmbedInput, streaming
from embedrl_verl.embedder.batching import NOT_FINITE
from embedrl_verl.embedder.gather import Gatherer
from embedrl_verl.embedder.served.client import ServedEmbedder, open_pool
from embedrl_verl.embedder.streaming import EmbeddedRows, QueuedVectors, RowBackend, row_backend
from embedrl_verl.errors import ConfigError, EmbedderError
from tests.embedder.inputs import item


class Queue:
    """TransferQueue, as far as this package asks it; takes its time for a put, and refuses the key `refused`."""

    def __init__(self, rows: dict[str, torch.Tensor] | None = None, refused: str = "") -> None:
        self.rows, self.refused, self.puts = dict(rows or {}), refused, []

    def kv_batch_get(self, *, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        assert (partition_id, select_fields) == ("embed", ["embeddings"])
        found = [self.rows[key] for key in keys if key in self.rows]
        mixed = len({len(row) for row in found}) > 1
        joined = torch.nested.as_nested_tensor(found, layout=torch.jagged) if mixed else torch.stack(found)
        return TensorDict({"embeddings": joined}, batch_size=[len(found)])

    async def async_kv_batch_put(self, *, keys, partition_id, fields, tags) -> None:
        self.puts.append((partition_id, list(keys)))
        await asyncio.sleep(0.01)
        if self.refused in keys:
            raise RuntimeError("the queue is full")
        assert len(keys) == len(tags) == len(fields)
        self.rows.update(zip(keys, fields.get("embeddings", [fields]), strict=True))


@pytest.fixture
def queue(monkeypatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(streaming, "tq", made)
    return made


def test_vectors_come_in_the_order_asked_for_at_length_one(queue):
    queue.rows = {f"u{i}_0_0": torch.nn.functional.one_hot(torch.tensor(i), 4) * (1.0 + i / 1000) for i in range(4)}
    vectors, failures = QueuedVectors().embed_rows(["u2_0_0", "u0_0_0", "u3_0_0"], "embed")
    assert torch.equal(vectors, torch.eye(4)[[2, 0, 3]]) and failures == {}


def test_what_is_no_vector_is_a_failed_row_and_never_zeros(queue):
    queue.rows = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2), "c": torch.tensor([torch.nan, 1.0])}
    vectors, failures = QueuedVectors().embed_rows(["a", "b", "c"], "embed")
    assert failures == {1: NOT_FINITE, 2: NOT_FINITE}
    assert torch.isnan(vectors[1:]).all() and torch.equal(vectors[0], queue.rows["a"])


def test_rows_that_the_queue_does_not_have_and_mixed_widths_are_errors(queue):
    queue.rows = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(EmbedderError, match="asked for 2 vectors"):
        QueuedVectors().embed_rows(["a", "z"], "embed")
    with pytest.raises(EmbedderError, match=r"different widths, \[2, 3\]"):
        QueuedVectors().embed_rows(["a", "b"], "embed")
    with pytest.raises(EmbedderError, match="frozen"):
        QueuedVectors().embed_rows(["a"], "embed", averaged=True)


def test_the_workers_backend_stores_tokens_and_pixels(checkpoint, queue):
    worker = row_backend(EmbedderConfig(path=str(checkpoint())), max_frames=8, processes=1)
    assert type(worker) is RowBackend
    asyncio.run(worker.store("a", "embed", worker.prepare(EmbedInput(item("a")), "query")))
    assert set(queue.rows["a"].keys()) == {"input_ids", "position_ids", "multi_modal_inputs"}


class Ready:
    """Gives the vector that it is handed."""

    async def embed(self, prepared: torch.Tensor) -> torch.Tensor:
        return prepared


def store(rows: Sequence[tuple[str, str, torch.Tensor]]) -> list:
    backend = EmbeddedRows(Ready())

    async def run() -> list:
        return await asyncio.gather(*(backend.store(*row) for row in rows), return_exceptions=True)

    return asyncio.run(run())


def test_vectors_that_come_while_a_put_is_under_way_go_together_in_the_next(queue):
    rows = [(f"u{i}", "embed", torch.full((4,), float(i))) for i in range(100)]
    assert store(rows) == [None] * 100
    assert len(queue.puts) <= 2
    assert {key: vector.tolist() for key, vector in queue.rows.items()} == {key: v.tolist() for key, _, v in rows}


def test_partitions_and_widths_are_not_mixed_and_a_refused_put_fails_its_rows_alone(queue):
    queue.refused = "b"
    first, second, third = store(
        [("a", "embed", torch.ones(2)), ("b", "embed", torch.ones(3)), ("c", "other", torch.ones(2))]
    )
    assert (first, third) == (None, None) and str(second) == "the queue is full"
    assert queue.puts == [("embed", ["a"]), ("embed", ["b"]), ("other", ["c"])]


def test_a_call_that_is_cancelled_takes_no_other_along():
    async def double(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [2 * one for one in items]

    async def run() -> list:
        gatherer = Gatherer(double, most=2)
        calls = [asyncio.create_task(gatherer(number)) for number in range(4)]
        await asyncio.sleep(0)
        calls[0].cancel()
        return await asyncio.wait_for(asyncio.gather(*calls[1:]), timeout=60)

    assert asyncio.run(run()) == [2, 4, 6]


def test_calls_go_on_in_another_event_loop_when_one_has_ended():
    async def wait(items: list[int]) -> list[int]:
        await asyncio.sleep(60 if items == [0] else 0)
        return items

    gatherer = Gatherer(wait)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gatherer(0), timeout=0.01)

    asyncio.run(give_up())
    assert asyncio.run(asyncio.wait_for(gatherer(1), timeout=60)) == 1


def test_agent_loop_workers_share_the_limit(checkpoint):
    server = EmbedderServerConfig(urls=("http://localhost:1",), limit=20, max_model_len=100)
    config = EmbedderConfig(path=str(checkpoint()), backend="server", server=server)
    backend = row_backend(config, max_frames=8, processes=8)
    assert isinstance(backend, EmbeddedRows) and isinstance(backend._embedder, ServedEmbedder)
    assert backend._embedder.pool.settings.limit == 2
    assert backend._embedder._processor.max_length == 100
    assert open_pool(server, share=64).settings.limit == 1


def test_a_key_that_is_not_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        open_pool(EmbedderServerConfig(urls=("http://localhost:1",), api_key_env="NO_SUCH_KEY"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"backend": "remote"}, "embedder.backend must be 'worker', 'server' or 'sentence_transformers'"),
        ({"backend": "server", "train": {"enable": True}}, "embedder.backend must be worker with train.enable=True"),
        ({"backend": "sentence_transformers", "train": {"enable": True}}, "must be worker with train.enable=True"),
        ({"server": {"limit": 0}}, "embedder.server.limit must be greater than or equal to 1"),
        ({"server": {"deadline_s": 0}}, "embedder.server.deadline_s must be greater than 0"),
        (
            {"server": {"gpu_memory_utilization": 1.5}},
            "server.gpu_memory_utilization must be less than or equal to 1",
        ),
        ({"server": {"extra_args": ["64"]}}, "embedder.server.extra_args must be a list of --option=value"),
        ({"server": {"url": "http://a"}}, "embedder.server has no key url"),
        ({"sentence": {"n_gpus": 2}}, "embedder.sentence.n_gpus must be less than or equal to 1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        parse_embedrl_section({"embedder": {"path": "x", **section}})


def test_the_sections_are_read_with_their_types():
    server = {"urls": ["http://localhost:1"], "timeout_s": 5}
    section = {"path": "x", "backend": "server", "server": server, "sentence": {"n_gpus": 0}}
    embedder = parse_embedrl_section({"embedder": section}).embedder
    assert embedder.server.urls == ("http://localhost:1",) and embedder.server.timeout_s == 5.0
    assert embedder.sentence == SentenceConfig(n_gpus=0)
