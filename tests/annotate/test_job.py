# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` as its user sees it: parts, lists, counts, cards, exit codes, and going on."""

import errno
import hashlib
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedrl_verl.annotate import assemble as assemble_module
from embedrl_verl.annotate import workfolder
from embedrl_verl.annotate.backends import Refused, Reply
from embedrl_verl.annotate.progress import TooManyBad
from embedrl_verl.annotate.report import Prices
from embedrl_verl.annotate.tcots import TcotSettings
from embedrl_verl.data.files import known_hash, licences_of, pair_files
from embedrl_verl.data.parquet import SCHEMA, read_pairs
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError, ResourceError
from tests.annotate.fakes import FakeBackend, contents, job, pair_file, pairs, some_bad, tcot


def run(*args, **kwargs):
    said = []
    return job(*args, **kwargs).run(said.append), said


def output(folder):
    return [pair for part in pair_files([folder]) for pair in read_pairs(part)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path):
    return pair_file(tmp_path / "in.parquet", 30)


def test_the_records_are_those_of_the_input_with_a_tcot_on_each_side(file, tmp_path):
    code, said = run([file], tmp_path / "out")
    found = output(tmp_path / "out")
    bare = [replace(p, query=replace(p.query, tcot=""), target=replace(p.target, tcot="")) for p in found]
    assert code == 0 and bare == pairs(30)
    assert all("<answer>" in pair.query.tcot and "<answer>" in pair.target.tcot for pair in found)
    assert said[-1].startswith("wrote 30 of 30 pairs")


def test_failed_sides_are_listed_with_their_last_reply_and_counted_by_problem(file, tmp_path):
    out = tmp_path / "out"
    run([file], out, FakeBackend(some_bad))
    failed, card = lines(out / "failed.jsonl"), json.loads((out / "data_card.json").read_text())
    counts = card["annotation"]
    assert counts["sides_failed"] == len(failed) > 0
    assert {line["cause"] for line in failed} >= {"HTTP 400"} and {line["tries"] for line in failed} <= {1, 2, 3}
    for line in failed:
        assert line["file"] == str(file) and pairs(30)[line["row"]].pair_id == line["pair_id"] and line["problems"]
        assert line["text"].startswith("no T-CoT") or line["cause"] == "HTTP 400"
    lost = {line["pair_id"] for line in failed}
    assert [pair.pair_id for pair in output(out)] == [f"p{n}" for n in range(30) if f"p{n}" not in lost]
    assert (
        counts["refused_replies"]["<thinking> must hold exactly one JSON object"]
        == counts["replies"] - counts["sides_with_tcot"]
    )


def test_failed_records_can_be_kept_without_their_tcot(file, tmp_path):
    run([file], tmp_path / "out", FakeBackend(some_bad), keep_failed=True)
    found = output(tmp_path / "out")
    assert len(found) == 30 and sum(not pair.query.tcot for pair in found) > 0


def test_tokens_and_cost_are_those_of_all_replies_also_the_refused_ones(file, tmp_path):
    backend = FakeBackend(some_bad)
    _, said = run([file], tmp_path / "out", backend, prices=Prices(2.0, 10.0))
    counts = json.loads((tmp_path / "out" / "data_card.json").read_text())["annotation"]
    texts = [json.loads(body)[0][0]["content"][-1]["text"] for body in backend.asked]
    refused = len(backend.asked) - counts["replies"]
    assert refused > 0  # a refused request has no tokens
    assert 0 < counts["prompt_tokens"] < sum(map(len, texts))
    expected = (2.0 * counts["prompt_tokens"] + 10.0 * counts["completion_tokens"]) / 1e6
    assert counts["cost"] == round(expected, 6) and f"cost: {expected:,.4f}" in said
    by_source = counts["by_source"].values()
    assert sum(found["completion_tokens"] for found in by_source) == counts["completion_tokens"]


def test_replies_without_usage_are_counted(file, tmp_path):
    run([file], tmp_path / "out", FakeBackend(lambda text, digest: Reply(tcot("text_keywords"), False, None, None)))
    counts = json.loads((tmp_path / "out" / "data_card.json").read_text())["annotation"]
    assert counts["replies_without_usage"] == counts["replies"] > 0 and counts["prompt_tokens"] == 0


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_answer_is_told_to_a_share_drawn_by_pair_id(share, tmp_path):
    told = set()
    file = tmp_path / "in.parquet"
    write_pairs(
        [replace(pair, target=replace(pair.target, text=f"gold{n}")) for n, pair in enumerate(pairs(300)) if n % 3 < 2],
        file,
    )

    def look(text, digest):
        if "Answer: gold" in text:
            told.add(text.rsplit("gold", 1)[1])

    run([file], tmp_path / "out", FakeBackend(look), settings=TcotSettings(gold_share=share, sides=("query",)))
    counts = json.loads((tmp_path / "out" / "data_card.json").read_text())["annotation"]
    assert counts["sides_with_gold"] == len(told) and counts["sides_that_could_be_told"] == 200
    assert abs(len(told) / 200 - share) < 0.1
    if share == 0.4:  # another seed tells others, a larger share tells more
        before = set(told)
        told.clear()
        run([file], tmp_path / "b", FakeBackend(look), settings=TcotSettings(gold_share=0.6, sides=("query",)))
        assert before < told
        told.clear()
        run([file], tmp_path / "c", FakeBackend(look), settings=TcotSettings(gold_share=0.4, sides=("query",), seed=1))
        assert told != before


def test_sides_that_have_a_tcot_are_kept_unless_told_otherwise(file, tmp_path):
    half = [replace(p, query=replace(p.query, tcot="old")) if n % 2 else p for n, p in enumerate(pairs(30))]
    write_pairs(half, file)
    backend = FakeBackend()
    run([file], tmp_path / "out", backend)
    found = output(tmp_path / "out")
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
    assert code == 3 and [(line["row"], line["field"]) for line in rejected] == [
        (2, "target"),
        (5, "pair_id"),
        (7, "query"),
        (8, "target"),
    ]
    assert "not a readable image" in rejected[2]["reason"] and "needs a media root" in rejected[3]["reason"]
    assert len(output(tmp_path / "out")) == 26
    assert "4 rows cannot be used, see rejected.jsonl" in said
    assert run([file], tmp_path / "out")[0] == 3  # also when there is nothing left to do
    with pytest.raises(TooManyBad, match=r"4 of 30 rows cannot be used, above --max-bad-share 0.1"):
        run([file], tmp_path / "strict", max_rejected_share=0.1)


def test_a_share_of_failures_above_the_limit_stops_and_a_higher_limit_goes_on(file, tmp_path):
    with pytest.raises(TooManyBad, match="above --max-failed-share 0.01"):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.01)
    with pytest.raises(DataError, match="unfinished"):
        pair_files([tmp_path / "out"])
    backend = FakeBackend(some_bad)
    assert run([file], tmp_path / "out", backend)[0] == 0 and not backend.asked
    run([file], tmp_path / "unbroken", FakeBackend(some_bad))
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": TcotSettings(reask="resample", seed=1)}, "seed 0, now 1"),
        ({"settings": TcotSettings(reask="resample", temperature=0.5)}, "temperature 0.0, now 0.5"),
        ({"keep_failed": True}, "keep_failed False, now True"),
        ({"chunk_rows": 8}, "chunk_rows 4, now 8"),
    ],
)
def test_other_settings_never_mix_in_a_folder(change, named, file, tmp_path):
    with pytest.raises(TooManyBad):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.0)
    for state in ("was begun", "is finished"):
        with pytest.raises(ConfigError, match=f"{state} with other settings .*{named}.*must not mix"):
            run([file], tmp_path / "out", FakeBackend(some_bad), **change)
        run([file], tmp_path / "out", FakeBackend(some_bad))


def test_another_model_or_another_input_never_mixes_in_a_folder(file, tmp_path):
    class Lost(FakeBackend):
        async def complete(self, request):
            raise ConnectionError

    class Other(FakeBackend):
        async def meet(self):
            return {"model": "other"}

    with pytest.raises(ConnectionError):
        run([file], tmp_path / "out", Lost())
    with pytest.raises(ConfigError, match="model 'fake', now 'other'"):
        run([file], tmp_path / "out", Other())
    pair_file(file, 31)
    with pytest.raises(ConfigError, match="with other settings .input"):
        run([file], tmp_path / "out")


def test_a_full_disk_is_told_and_nobody_needs_to_serve_when_only_the_writing_is_left(file, tmp_path, monkeypatch):
    publish, names = assemble_module.publish, []

    def full(temporary, target):
        if target.name == "part-00002.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        names.append(target.name)
        publish(temporary, target)

    monkeypatch.setattr(assemble_module, "publish", full)
    with pytest.raises(ResourceError, match=r"out: the disk is full; what is finished is kept\. Free space"):
        run([file], tmp_path / "out")
    assert names == ["part-00000.parquet", "part-00001.parquet"] and not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()

    class Away(FakeBackend):
        async def meet(self):
            raise AssertionError("nobody is there")

    assert run([file], tmp_path / "out", Away())[0] == 0
    run([file], tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("name", ["settings.json", "served.json", "data_card.json"])
def test_a_disk_that_cannot_be_written_is_told_wherever_it_happens(name, file, tmp_path, monkeypatch):
    write = workfolder.write_json

    def full(path, content):
        if path.name == name:
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, content)

    monkeypatch.setattr(workfolder, "write_json", full)
    with pytest.raises(ResourceError, match=r"out: cannot be written \(.*Read-only"):
        run([file], tmp_path / "out")
    monkeypatch.undo()
    assert run([file], tmp_path / "out")[0] == 0


def test_a_model_that_is_named_later_is_not_passed_over(file, tmp_path):
    """Nobody is asked any more, but the user must not think that another model wrote the T-CoTs."""

    class Named(FakeBackend):
        def wanted(self):
            return {"model": "other"}

    with pytest.raises(TooManyBad):
        run([file], tmp_path / "out", FakeBackend(some_bad), max_failed_share=0.0)
    for state in ("was begun", "is finished"):
        with pytest.raises(ConfigError, match=f"{state} with other settings .model 'fake', now 'other'"):
            run([file], tmp_path / "out", Named(some_bad))
        assert run([file], tmp_path / "out", FakeBackend(some_bad))[0] == 0


def test_two_processes_never_work_in_one_folder(file, tmp_path):
    class Second(FakeBackend):
        async def complete(self, request):
            if not self.asked:
                with pytest.raises(ConfigError, match="another process is writing"):
                    job([file], tmp_path / "out").run()
            return await super().complete(request)

    import threading

    found = []
    backend = Second()
    worker = threading.Thread(target=lambda: found.append(run([file], tmp_path / "out", backend)[0]))
    worker.start()
    worker.join()
    assert found == [0]


def test_the_card_tells_hashes_settings_and_licences_and_no_time(file, tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    pair_file(source / "part-00000.parquet", 30)
    (source / "data_card.json").write_text(json.dumps({"licence": "CC0-1.0", "media_root": None}))
    one = job([source / "part-00000.parquet"], tmp_path / "a")
    two = job([source / "part-00000.parquet"], tmp_path / "b")
    assert one.run(str) == two.run(str) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    card = json.loads((tmp_path / "a" / "data_card.json").read_text())
    assert card["licence"] == "CC0-1.0" and card["records"] == 30 and card["by_source"]["source0"] == {"records": 10}
    part = tmp_path / "a" / card["parts"][0]["file"]
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    assert card["parts"][0] == {"file": part.name, "records": 4, "bytes": part.stat().st_size, "sha256": digest}
    assert known_hash(part) == digest and licences_of([part, file]) == "CC0-1.0; not declared"
    assert card["settings"]["gold_share"] == 0.0 and card["served"] == {"model": "fake"}
    assert "| source0 | 10 | 20 | 0 | 0 |" in (tmp_path / "a" / "data_card.md").read_text()


def test_nothing_left_is_an_error(file, tmp_path):
    with pytest.raises(DataError, match="no pair is left"):
        run([file], tmp_path / "out", FakeBackend(lambda text, digest: Refused("HTTP 400", "no")))
