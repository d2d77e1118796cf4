# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as its user sees it: parts, lists, counts, cards, exit codes, and going on."""

import asyncio
import errno
import hashlib
import json
import os
import signal
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.annotate.backends import Refused, Reply, ServerBackend, ServersLost
from embedrl_verl.annotate.job import Prices
from embedrl_verl.annotate.runner import TooManyFailed
from embedrl_verl.annotate.tcots import TcotSettings
from embedrl_verl.data import writer
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError, ResourceError
from tests.annotate.fakes import FakeBackend, contents, job, key_in, pair_file, pairs, some_bad, tcot
from tests.serving.fakes import FakeServer, quick_pool


def run(*args, **kwargs):
    said = []
    return job(*args, **kwargs).run(said.append), said


def output(folder):
    return [pair for part in pair_files([folder]) for pair in read_pairs(part)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def annotation(folder):
    return json.loads((folder / "data_card.json").read_text())["annotation"]


@pytest.fixture
def file(tmp_path):
    return pair_file(tmp_path / "in.parquet", 30)


def test_failed_sides_are_listed_with_their_last_reply_and_counted_by_problem(file, tmp_path):
    out = tmp_path / "out"
    run([file], out, FakeBackend(some_bad))
    failed, counts = lines(out / "failed.jsonl"), annotation(out)
    assert counts["sides_failed"] == len(failed) > 0
    assert {line["cause"] for line in failed} >= {"HTTP 400"} and {line["tries"] for line in failed} <= {1, 2, 3}
    for line in failed:
        assert line["file"] == str(file) and pairs(30)[line["row"]].pair_id == line["pair_id"] and line["problems"]
        assert line["text"].startswith("no T-CoT") or line["cause"] == "HTTP 400"
    lost = {line["pair_id"] for line in failed}
    assert [pair.pair_id for pair in output(out)] == [f"p{n}" for n in range(30) if f"p{n}" not in lost]
    refused = counts["refused_replies"]["<thinking> must hold exactly one JSON object"]
    assert refused == counts["replies"] - counts["sides_with_tcot"]
    run([file], tmp_path / "kept", FakeBackend(some_bad), keep_failed=True)
    kept = output(tmp_path / "kept")
    assert len(kept) == 30 and sum(not pair.query.tcot for pair in kept) > 0


def test_tokens_and_cost_are_those_of_all_replies_also_of_rows_that_are_rejected(file, tmp_path):
    values = pq.read_table(file).to_pylist()
    values[3]["query"]["images"] = [{"path": None, "bytes": b"no image"}]
    pq.write_table(pa.Table.from_pylist(values, schema=SCHEMA), file)
    backend = FakeBackend(some_bad)
    _, said = run([file], tmp_path / "out", backend, prices=Prices(2.0, 10.0))
    texts = [json.loads(body)[0][0]["content"][-1]["text"] for body in backend.asked]
    digests = [int(hashlib.sha256(body.encode()).hexdigest()[:8], 16) for body in backend.asked]
    replies = [some_bad(*one) or Reply("", False, len(one[0]), 9) for one in zip(texts, digests, strict=True)]
    replies = [one for one in replies if isinstance(one, Reply)]
    counts = annotation(tmp_path / "out")
    found = [counts[name] for name in ("replies", "prompt_tokens", "completion_tokens")]
    prompt, completion = sum(one.prompt_tokens for one in replies), sum(one.completion_tokens for one in replies)
    assert found == [len(replies), prompt, completion] and len(replies) < len(texts)  # a refused request has none
    assert counts["cost"] == round((2 * prompt + 10 * completion) / 1e6, 6) and f"cost: {counts['cost']:,.4f}" in said
    assert sum(one["completion_tokens"] for one in counts["by_source"].values()) == completion
    run([file], tmp_path / "b", FakeBackend(lambda text, digest: Reply(tcot("text_keywords"), False, None, None)))
    counts = annotation(tmp_path / "b")
    assert counts["replies_without_usage"] == counts["replies"] - 1 > 0 == counts["prompt_tokens"]


def test_the_answer_is_told_to_a_share_drawn_by_pair_id(tmp_path):
    told, file = set(), tmp_path / "in.parquet"
    texts = [(n, pair) for n, pair in enumerate(pairs(300)) if n % 3 < 2]
    write_pairs([replace(pair, target=replace(pair.target, text=f"gold{n}")) for n, pair in texts], file)

    def look(text, digest):
        if "Answer: gold" in text:
            told.add(text.rsplit("gold", 1)[1])

    def tell(name, **settings):
        told.clear()
        run([file], tmp_path / name, FakeBackend(look), settings=TcotSettings(sides=("query",), **settings))
        counts = annotation(tmp_path / name)
        assert counts["sides_with_gold"] == len(told) and counts["sides_that_could_be_told"] == 200
        return set(told)

    some = tell("a", gold_share=0.4)
    assert not tell("none") and len(tell("all", gold_share=1.0)) == 200 and abs(len(some) / 200 - 0.4) < 0.1
    assert some < tell("b", gold_share=0.6) and some != tell("c", gold_share=0.4, seed=1)


def test_records_are_those_of_the_input_and_their_tcots_are_kept_unless_told_otherwise(file, tmp_path):
    half = [replace(p, query=replace(p.query, tcot="old")) if n % 2 else p for n, p in enumerate(pairs(30))]
    write_pairs(half, file)
    backend = FakeBackend()
    code, said = run([file], tmp_path / "out", backend)
    found = output(tmp_path / "out")
    assert code == 0 and said[-1].startswith("wrote 30 of 30 pairs")
    assert [replace(p, query=replace(p.query, tcot=""), target=replace(p.target, tcot="")) for p in found] == pairs(30)
    assert len(backend.asked) == 45 and [p.query.tcot == "old" for p in found] == [n % 2 == 1 for n in range(30)]
    run([file], tmp_path / "over", backend, settings=TcotSettings(overwrite=True))
    assert not any(pair.query.tcot == "old" for pair in output(tmp_path / "over"))


def test_rows_that_cannot_be_used_are_listed_and_the_exit_code_is_3(file, tmp_path):
    values = pq.read_table(file).to_pylist()
    values[2]["target"] = None
    values[5]["pair_id"] = "p4"
    values[7]["query"]["images"] = [{"path": None, "bytes": b"no image"}]
    values[8]["target"]["video"] = {"frames": [{"path": "away.png", "bytes": None}], "path": None, "fps": 1.0}
    pq.write_table(pa.Table.from_pylist(values, schema=SCHEMA), file)
    code, said = run([file], tmp_path / "out")
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    where = [(line["row"], line["field"], line["pair_id"]) for line in rejected]
    assert code == 3 and where == [(2, "target", "p2"), (5, "pair_id", "p4"), (7, "query", "p7"), (8, "target", "p8")]
    assert {line["file"] for line in rejected} == {str(file)}
    assert rejected[0]["reason"].startswith("null; a pair needs both")
    assert rejected[1]["reason"] == f"pair_id must be unique; {file}, row 4 has it too"
    assert "not a readable image" in rejected[2]["reason"] and "needs a media root" in rejected[3]["reason"]
    assert len(output(tmp_path / "out")) == 26
    assert "4 rows cannot be used, see rejected.jsonl" in said
    assert run([file], tmp_path / "out")[0] == 3  # also when there is nothing left to do
    with pytest.raises(DataError, match=r"4 of 30 rows cannot be used, over the limit of 10.00%:"):
        run([file], tmp_path / "strict", max_rejected_share=0.1)
    assert len(lines(tmp_path / "strict" / "rejected.jsonl")) == 4
    assert run([file], tmp_path / "strict")[0] == 3  # with a higher limit it goes on


def test_a_pair_id_of_another_file_makes_a_row_unusable(file, tmp_path):
    run([file, pair_file(tmp_path / "b.parquet", 2)], tmp_path / "out")
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [(line["file"][-9:], line["row"]) for line in rejected] == [("b.parquet", 0), ("b.parquet", 1)]


def test_a_share_of_failures_above_the_limit_stops_and_a_higher_limit_goes_on(file, tmp_path):
    with pytest.raises(TooManyFailed, match="over --max-failed-share 0.01"):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.01)
    with pytest.raises(DataError, match="unfinished"):
        pair_files([tmp_path / "out"])
    backend = FakeBackend(some_bad)
    assert run([file], tmp_path / "out", backend)[0] == 0 and not backend.asked
    run([file], tmp_path / "unbroken", FakeBackend(some_bad))
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.fixture
def interruptible():
    """Ctrl-C does here what it does in a command, whatever an earlier test of this process has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_every_answer(file, tmp_path):
    class Stopped(FakeBackend):
        async def complete(self, request):
            reply = await super().complete(request)
            if len(self.asked) in (25, 26):
                signal.raise_signal(signal.SIGINT)
            return reply

    first, again = Stopped(), FakeBackend()
    with pytest.raises(KeyboardInterrupt):
        run([file], tmp_path / "out", first, limit=1, threads=1)
    assert run([file], tmp_path / "out", again)[0] == 0
    assert 25 <= len(first.asked) < 60 and len(first.asked) + len(again.asked) <= 60 + 3  # what was in flight
    assert len(set(first.asked) | set(again.asked)) == 60


def test_a_job_whose_server_dies_goes_on_with_another_and_asks_nothing_twice(file, tmp_path):
    """Through the real client; the server ends itself at the 20th question."""

    async def served(asks, dies_at):
        def answer(path, body):
            if path == "/v1/models":
                return {"data": [{"id": "m", "owned_by": "vllm"}]}
            asks.append(body["seed"])
            if len(asks) == dies_at:
                stopping.append(asyncio.ensure_future(server._runner.cleanup()))
            text = tcot(key_in(body["messages"][0]["content"][-1]["text"]))
            return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}

        stopping = []
        async with FakeServer(answer) as server:
            backend = ServerBackend(quick_pool(server.url), "qwen2_vl", patience_s=0.5)
            return await asyncio.to_thread(run, [file], tmp_path / "out", backend)

    first, again = [], []
    with pytest.raises(ServersLost, match="no server was up for 0.5 s.*run the command again"):
        asyncio.run(served(first, 20))
    assert asyncio.run(served(again, 0))[0] == 0
    assert len(set(first + again)) == 60 and len(set(first) & set(again)) <= 8 + 4  # in flight as it died
    assert annotation(tmp_path / "out")["prompt_tokens"] == 60 * 9


class Named(FakeBackend):
    def wanted(self):
        return {"model": "other"}


@pytest.mark.parametrize(
    ("backend", "change", "named"),
    [
        (FakeBackend, {"settings": TcotSettings(reask="resample", seed=1)}, "settings.seed was 0, is 1"),
        (FakeBackend, {"keep_failed": True}, "settings.keep_failed was False, is True"),
        (Named, {}, "model was 'fake', is 'other'"),
        (FakeBackend, {"files": 31}, r"input\[0\].bytes was"),
    ],
)
def test_other_settings_another_model_or_another_input_never_mix(backend, change, named, file, tmp_path):
    with pytest.raises(TooManyFailed):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.0)
    begun, stat = file.read_bytes(), file.stat()
    for finish in (True, False):
        if "files" in change:
            pair_file(file, 31)
        with pytest.raises(ConfigError, match=named):
            run([file], tmp_path / "out", backend(some_bad), **{k: v for k, v in change.items() if k != "files"})
        file.write_bytes(begun)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if finish:
            assert run([file], tmp_path / "out", FakeBackend(some_bad))[0] == 0


def test_a_job_does_not_go_on_over_rows_that_were_exchanged(tmp_path):
    """Their file has the same size and statistics."""
    file, texts = tmp_path / "in.parquet", pairs(90)[::3]
    write_pairs(texts, file)
    with pytest.raises(TooManyFailed):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.0)
    write_pairs(
        [replace(texts[0], target=texts[1].target), replace(texts[1], target=texts[0].target), *texts[2:]], file
    )
    with pytest.raises(ConfigError, match=r"stamps\[0\] was"):
        run([file], tmp_path / "out")


def test_a_full_disk_is_told_and_nobody_needs_to_serve_when_only_the_writing_is_left(file, tmp_path, monkeypatch):
    publish = writer.publish

    def full(temporary, target):
        if target.name == "part-00002.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(temporary, target)

    monkeypatch.setattr(writer, "publish", full)
    with pytest.raises(ResourceError, match=r"the disk is full; what is finished is kept\. Free space"):
        run([file], tmp_path / "out")
    kept = {"part-00000.parquet", "part-00001.parquet"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == kept
    monkeypatch.undo()

    class Away(FakeBackend):
        async def connect(self):
            raise AssertionError("nobody is there")

    assert run([file], tmp_path / "out", Away())[0] == 0
    run([file], tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_the_card_tells_licence_settings_and_counts(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    pair_file(source / "part-00000.parquet", 30)
    (source / "data_card.json").write_text(json.dumps({"licence": "CC0-1.0", "media_root": None}))
    run([source / "part-00000.parquet"], tmp_path / "a")
    card = json.loads((tmp_path / "a" / "data_card.json").read_text())
    assert card["licence"] == "CC0-1.0" and card["records"] == 30 and card["by_source"]["source0"] == {"records": 10}
    assert card["build"]["settings"]["gold_share"] == 0.0 and card["served"] == {"model": "fake"}
    page = (tmp_path / "a" / "data_card.md").read_text().splitlines()
    assert next(line for line in page if line.startswith("source0")).split()[:5] == ["source0", "10", "20", "0", "0"]


def test_nothing_left_is_an_error(file, tmp_path):
    with pytest.raises(DataError, match="no pair is left"):
        run([file], tmp_path / "out", FakeBackend(lambda text, digest: Refused("HTTP 400", "no")))
    assert len(lines(tmp_path / "out" / "failed.jsonl")) == 60
