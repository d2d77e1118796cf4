# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as its user sees it: parts, lists, counts, cards, exit codes, and going on."""

import asyncio
import errno
import json
import os
import signal
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.annotate.backends import Refused, Reply, ServerBackend, ServersLost
from embedrl_verl.annotate.job import TooManyFailed
from embedrl_verl.annotate.tcots import TcotSettings
from embedrl_verl.data import writer
from embedrl_verl.data.files import pair_files
from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError, ResourceError
from tests.annotate.fakes import FakeBackend, contents, job, pair_file, pairs, some_bad, tcot
from tests.serving.fakes import FakeServer, quick_pool


def output(folder):
    return [pair for part in pair_files([folder]) for pair in read_pairs(part)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def card(folder):
    return json.loads((folder / "data_card.json").read_text())


@pytest.fixture
def file(tmp_path):
    return pair_file(tmp_path / "in.parquet", 30)


@pytest.fixture
def run(file, tmp_path):
    """Annotates `file` into a folder; returns exit code and lines."""

    def go(name="out", *args, files=(), **changes):
        said = []
        return job([file, *files], tmp_path / name, *args, **changes).run(said.append), said

    return go


@pytest.fixture
def spoil(file):
    """Changes the values of the input's rows."""

    def change(edit):
        values = pq.read_table(file).to_pylist()
        edit(values)
        pq.write_table(pa.Table.from_pylist(values, schema=SCHEMA), file)

    return change


def test_failed_sides_are_listed_with_their_last_reply_and_counted_by_problem(run, file, tmp_path):
    run("out", FakeBackend(some_bad))
    failed, counts = lines(tmp_path / "out" / "failed.jsonl"), card(tmp_path / "out")["annotation"]
    assert counts["sides_failed"] == len(failed) > 0
    assert {line["cause"] for line in failed} >= {"HTTP 400"} and {line["tries"] for line in failed} <= {1, 2, 3}
    for line in failed:
        assert line["file"] == str(file) and pairs(30)[line["row"]].pair_id == line["pair_id"] and line["problems"]
        assert line["text"].startswith("no T-CoT") or line["cause"] == "HTTP 400"
    lost = {line["pair_id"] for line in failed}
    assert [pair.pair_id for pair in output(tmp_path / "out")] == [f"p{n}" for n in range(30) if f"p{n}" not in lost]
    refused = counts["refused_replies"]["<thinking> must hold exactly one JSON object"]
    assert refused == counts["replies"] - counts["sides_with_tcot"]
    run("kept", FakeBackend(some_bad), keep_failed=True)
    kept = output(tmp_path / "kept")
    assert len(kept) == 30 and sum(not pair.query.tcot for pair in kept) > 0


def test_tokens_and_cost_are_those_of_all_replies_also_of_rows_that_are_rejected(run, spoil, tmp_path):
    spoil(lambda values: values[3]["query"].update(images=[{"path": None, "bytes": b"no image"}]))
    backend = FakeBackend(some_bad)
    _, said = run("out", backend, price_prompt=2.0, price_completion=10.0)
    replies = [one for one in backend.replies if isinstance(one, Reply)]
    prompt, completion = sum(one.prompt_tokens for one in replies), sum(one.completion_tokens for one in replies)
    counts = card(tmp_path / "out")["annotation"]
    found = [counts[name] for name in ("replies", "prompt_tokens", "completion_tokens")]
    assert found == [len(replies), prompt, completion] and len(replies) < len(backend.asked)
    assert counts["cost"] == round((2 * prompt + 10 * completion) / 1e6, 6) and f"cost: {counts['cost']:,.4f}" in said
    assert sum(one["completion_tokens"] for one in counts["by_source"].values()) == completion
    _, said = run("b", FakeBackend(lambda text, digest: Reply(tcot(text))))
    counts = card(tmp_path / "b")["annotation"]
    assert counts["replies_without_usage"] == counts["replies"] == 59 and counts["prompt_tokens"] == 0
    assert "59 replies came without token counts; tokens are those of the rest" in said


def test_the_answer_is_told_to_a_share_drawn_by_pair_id(run, file, tmp_path):
    told, texts = set(), [(n, pair) for n, pair in enumerate(pairs(300)) if n % 3 < 2]
    write_pairs([replace(pair, target=replace(pair.target, text=f"gold{n}")) for n, pair in texts], file)

    def look(text, digest):
        if "Answer: gold" in text:
            told.add(text.rsplit("gold", 1)[1])

    def tell(name, **settings):
        told.clear()
        run(name, FakeBackend(look), settings=TcotSettings(sides=("query",), **settings))
        counts = card(tmp_path / name)["annotation"]
        assert counts["sides_with_gold"] == len(told) and counts["sides_that_could_be_told"] == 200
        return set(told)

    some = tell("a", gold_share=0.4)
    assert not tell("none") and len(tell("all", gold_share=1.0)) == 200 and abs(len(some) / 200 - 0.4) < 0.1
    assert some < tell("b", gold_share=0.6) and some != tell("c", gold_share=0.4, seed=1)


def test_records_are_those_of_the_input_and_their_tcots_are_kept_unless_told_otherwise(run, file, tmp_path):
    write_pairs([replace(p, query=replace(p.query, tcot="old")) if n % 2 else p for n, p in enumerate(pairs(30))], file)
    backend = FakeBackend()
    code, said = run("out", backend)
    found, facts = output(tmp_path / "out"), card(tmp_path / "out")
    assert code == 0 and said[-1].startswith("wrote 30 of 30 pairs")
    assert facts["served"] == {"model": "fake"} and facts["build"]["settings"]["gold_share"] == 0.0
    page = (tmp_path / "out" / "data_card.md").read_text().splitlines()
    assert next(line for line in page if line.startswith("source0")).split()[:5] == ["source0", "10", "15", "0", "0"]
    assert [replace(p, query=replace(p.query, tcot=""), target=replace(p.target, tcot="")) for p in found] == pairs(30)
    assert len(backend.asked) == 45 and [p.query.tcot == "old" for p in found] == [n % 2 == 1 for n in range(30)]
    run("over", backend, settings=TcotSettings(overwrite=True))
    assert not any(pair.query.tcot == "old" for pair in output(tmp_path / "over"))


def test_rows_that_cannot_be_used_are_listed_and_the_exit_code_is_3(run, spoil, file, tmp_path):
    def edit(values):
        values[2]["target"] = None
        values[5]["pair_id"] = "p4"
        values[7]["query"]["images"] = [{"path": None, "bytes": b"no image"}]
        values[8]["target"]["video"] = {"frames": [{"path": "away.png", "bytes": None}], "path": None, "fps": 1.0}

    spoil(edit)
    other = pair_file(tmp_path / "b.parquet", 1)
    for _ in range(2):  # also when there is nothing left to do
        code, said = run("out", files=[other])
        assert code == 3 and "5 rows cannot be used, see rejected.jsonl" in said
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    rows = [(2, "target", "p2"), (5, "pair_id", "p4"), (7, "query", "p7"), (8, "target", "p8"), (0, "pair_id", "p0")]
    assert [(line["row"], line["field"], line["pair_id"]) for line in rejected] == rows
    assert [line["file"] for line in rejected] == [str(file)] * 4 + [str(other)]
    reasons = [line["reason"] for line in rejected]
    assert reasons[0].startswith("null; a pair needs both") and "not a readable image" in reasons[2]
    assert reasons[1] == f"pair_id must be unique; {file}, row 4 has it too" and "needs a media root" in reasons[3]
    assert reasons[4] == f"pair_id must be unique; {file}, row 0 has it too"
    assert len(output(tmp_path / "out")) == 26
    with pytest.raises(DataError, match=r"4 of 30 rows cannot be used, over the limit of 10.00%:"):
        run("strict", max_rejected_share=0.1)
    assert len(lines(tmp_path / "strict" / "rejected.jsonl")) == 4
    assert run("strict")[0] == 3  # with a higher limit it goes on


def test_a_share_of_failures_above_the_limit_stops_and_a_higher_limit_goes_on(run, tmp_path):
    with pytest.raises(TooManyFailed, match="over --max-failed-share 0.01"):
        run("out", FakeBackend(some_bad), max_failed_share=0.01)
    with pytest.raises(DataError, match="unfinished"):
        pair_files([tmp_path / "out"])
    backend = FakeBackend(some_bad)
    assert run("out", backend)[0] == 0 and not backend.asked
    run("unbroken", FakeBackend(some_bad))
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_ctrl_c_keeps_every_answer(run):
    class Stopped(FakeBackend):
        async def complete(self, request):
            reply = await super().complete(request)
            if len(self.asked) in (25, 26):
                signal.raise_signal(signal.SIGINT)
            return reply

    first, again = Stopped(), FakeBackend()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever an earlier test has made of it
    with pytest.raises(KeyboardInterrupt):
        run("out", first, limit=1, threads=1)
    signal.signal(signal.SIGINT, before)
    assert run("out", again)[0] == 0
    assert 25 <= len(first.asked) < 60 and len(first.asked) + len(again.asked) <= 60 + 3  # what was in flight
    assert len(set(first.asked) | set(again.asked)) == 60


def test_a_job_whose_server_dies_goes_on_with_another_and_asks_nothing_twice(run, tmp_path):
    """Through the real client; the server ends itself at the 20th question."""

    async def served(asks, dies_at):
        def answer(path, body):
            if path == "/v1/models":
                return {"data": [{"id": "m", "owned_by": "vllm"}]}
            asks.append(body["seed"])
            if len(asks) == dies_at:
                stopping.append(asyncio.ensure_future(server._runner.cleanup()))
            text = tcot(body["messages"][0]["content"][-1]["text"])
            return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}

        stopping = []
        async with FakeServer(answer) as server:
            backend = ServerBackend(quick_pool(server.url, retries=1), "qwen2_vl", patience_s=0.5)
            return await asyncio.to_thread(run, "out", backend)

    first, again = [], []
    with pytest.raises(ServersLost, match=r"connection refused.*for 0.5 s \(--patience\).*run the command again"):
        asyncio.run(served(first, 20))
    assert asyncio.run(served(again, 0))[0] == 0
    assert len(set(first + again)) == 60 and len(set(first) & set(again)) <= 8 + 4  # in flight as it died
    assert card(tmp_path / "out")["annotation"]["prompt_tokens"] == 60 * 9


class Other(FakeBackend):
    async def connect(self):
        return {"model": "other"}


class Named(FakeBackend):
    def named(self):
        return {"model": "other"}


@pytest.mark.parametrize(
    ("backend", "change", "named", "finished"),
    [
        (FakeBackend, {"settings": TcotSettings(reask="resample", seed=1)}, "settings.seed was 0, is 1", True),
        (FakeBackend, {"keep_failed": True}, "settings.keep_failed was False, is True", True),
        (Named, {}, "settings.model.model was None, is 'other'", True),
        (Other, {}, "model was 'fake', is 'other'", False),
        (FakeBackend, {"rows": 31}, r"input\[0\].bytes was", True),
        (FakeBackend, {"rows": 30}, r"stamps\[0\] was", False),  # other rows may have the same size
    ],
)
def test_other_settings_another_model_or_another_input_never_mix(run, backend, change, named, finished, file, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run("out", FakeBackend(lambda text, digest: 1 // (digest % 3) and None))
    begun, stat, rows = file.read_bytes(), file.stat(), change.pop("rows", 0)
    for _ in range(1 + finished):
        if rows:
            pair_file(file, rows)
        with pytest.raises(ConfigError, match=named):
            run("out", backend(some_bad), **change)
        file.write_bytes(begun)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert run("out")[0] == 0


def test_a_full_disk_is_told_and_nobody_needs_to_serve_when_only_the_writing_is_left(run, tmp_path, monkeypatch):
    publish = writer.publish

    def full(temporary, target):
        if target.name == "part-00002.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(temporary, target)

    monkeypatch.setattr(writer, "publish", full)
    with pytest.raises(ResourceError, match=r"the disk is full; what is finished is kept\. Free space"):
        run("out")
    kept = {"part-00000.parquet", "part-00001.parquet"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == kept
    monkeypatch.undo()
    away = FakeBackend()
    away.connect = None
    assert run("out", away)[0] == 0
    run("unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_nothing_left_is_an_error(run, tmp_path):
    with pytest.raises(DataError, match="no pair is left"):
        run("out", FakeBackend(lambda text, digest: Refused("HTTP 400", "no")))
    assert len(lines(tmp_path / "out" / "failed.jsonl")) == 60
