# SPDX-License-Identifier: Apache-2.0
"""A dumped step is the step, bit for bit; a damaged file is named and never read in part."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from embedrl_verl.errors import DataError, EmbedRLError
from embedrl_verl.rewards.dump import dump_name, find_dumps, read_reward_dump, write_reward_dump
from embedrl_verl.rewards.load import load_reward_function
from embedrl_verl.rewards.score import call_reward_function
from embedrl_verl.tcot import parse_tcot

NAN = float("nan")
TENSORS = ("side", "pair", "rollout", "valid", "content", "similarity", "query_rows", "target_rows")


async def _judge(batch):
    return (batch.rollout % 2).float().masked_fill(batch.pair == 1, NAN)


@pytest.fixture
def batch(make_batch):
    embeddings = torch.nn.functional.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(3)), dim=1)
    embeddings[7] = NAN
    raw = embeddings.roll(1, dims=1).index_fill(0, torch.tensor([7, 9]), NAN)
    pair = make_batch().pair
    more = {"content": torch.stack((pair // 3, pair), dim=1), "lengths": torch.arange(40), "judge": _judge}
    return make_batch(embeddings=embeddings, raw_embeddings=raw, **more)


def _scores(batch, name):
    return call_reward_function(load_reward_function(f"pkg://embedrl_verl.rewards.functions.{name}")[0], batch, name)


@pytest.fixture
def dumped(tmp_path, rows_of):
    """Writes a batch with the scores of a ready-made function."""

    def write(batch, name="no_judge", folder=tmp_path, **change):
        path = folder / dump_name(3)
        write_reward_dump(path, batch, _scores(batch, name), rows=rows_of(batch), **change)
        return path

    return write


def _bits(value):
    return value.view(torch.int32) if value.dtype == torch.float32 else value


@pytest.mark.parametrize("name", ["paper", "public_code", "no_judge", "gain", "length_shaped", "soft_rank"])
def test_the_runs_own_function_gives_its_scores_again_bit_for_bit(dumped, batch, name):
    dump = read_reward_dump(dumped(batch, name))
    again = _scores(dump.batch, name)
    assert again.keys() == dump.parts.keys()
    for part, value in _scores(batch, name).items():
        assert _bits(dump.parts[part]).equal(_bits(value)) and _bits(again[part]).equal(_bits(value)), part
    assert dump.parts["score"].isnan().any() and not dump.parts["score"].isnan().all()


def test_everything_of_the_batch_is_there_again(dumped, rows_of, batch):
    dump = read_reward_dump(dumped(batch, "paper", function="reward/paper.py:compute_score"))
    again = dump.batch
    for name in (*TENSORS, "lengths", "raw_similarity"):
        assert _bits(getattr(again, name)).equal(_bits(getattr(batch, name))), name
    assert again.tcots == batch.tcots and again.required == batch.required
    assert again.process().nan_to_num(9).equal(batch.process().nan_to_num(9))
    assert dump.rows == rows_of(batch) and dump.function == "reward/paper.py:compute_score"


def test_the_functions_kwargs_are_there_again_and_older_dumps_have_none(dumped, batch):
    kwargs = {"gamma": 0.1, "accuracy": "all", "nested": {"k": [1, None, True]}}
    assert read_reward_dump(dumped(batch, kwargs=kwargs)).kwargs == kwargs
    assert read_reward_dump(dumped(batch, kwargs={})).kwargs == {}
    path = dumped(batch)
    assert b"reward_kwargs" not in path.read_bytes() and read_reward_dump(path).kwargs is None


def test_a_dump_of_version_1_knows_targets_alone_and_gives_its_scores_again(dumped, make_batch):
    pair = make_batch().pair
    batch = make_batch(content=(pair // 2)[:, None].expand(-1, 1))
    path = dumped(batch)
    tensors, metadata = {}, {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"version": "1"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"content": tensors["content"][:, 0].clone()}, path, metadata=metadata)
    old = read_reward_dump(path)
    assert old.batch.content.equal(batch.content)
    assert _bits(_scores(old.batch, "no_judge")["score"]).equal(_bits(old.parts["score"]))


def test_what_a_run_did_not_have_is_not_there(dumped, make_batch):
    batch = make_batch()
    again = read_reward_dump(dumped(batch)).batch
    assert again.judge is None and again.lengths is None and again.raw_similarity is None


def test_frames_and_images_limit_the_evidence_again_and_any_text_survives(tmp_path, make_batch, rows_of):
    texts = [
        '<thinking>{"key_frames": [1, 9]}</thinking><rethink>a</rethink><answer>b</answer>',
        "a lone \ud800 surrogate, ümläuts, \0 and 鷺",
    ]
    tcots = [parse_tcot(texts[i % 2], num_frames=4) for i in range(4)]
    batch = make_batch(2, 1, rows=torch.arange(4), tcots=tcots)
    rows = rows_of(batch, num_frames=4)
    write_reward_dump(tmp_path / dump_name(1), batch, {"score": torch.zeros(4)}, rows=rows)
    assert read_reward_dump(tmp_path / dump_name(1)).batch.tcots == tuple(tcots)


def test_parts_that_share_memory_are_written(tmp_path, make_batch, rows_of):
    batch, score = make_batch(2, 1), torch.arange(8.0)[::2]
    write_reward_dump(tmp_path / dump_name(1), batch, {"score": score, "base": score}, rows=rows_of(batch))
    assert read_reward_dump(tmp_path / dump_name(1)).parts["base"].tolist() == [0.0, 2.0, 4.0, 6.0]


def test_a_dump_is_there_whole_or_not_at_all(tmp_path, dumped, batch, monkeypatch):
    path = dumped(batch, folder=tmp_path / "new" / "folder")
    before = path.read_bytes()

    def full(_):
        assert path.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EmbedRLError, match=r"3.rewards.safetensors: the reward dump cannot be written \(.*No space"):
        dumped(batch, folder=path.parent)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "rows must have one entry for each of 40 rows; got 0"),
        ({"parts": {"format": torch.zeros(40)}}, "parts must have 'score'; got format"),
        ({"parts": {"score": torch.zeros(3)}}, r"part 'score' must be \(40,\) float32; got \(3,\)"),
        ({"parts": {"score": torch.zeros(40).double()}}, r"part 'score' must be \(40,\) float32; got .*float64"),
    ],
)
def test_what_is_not_of_the_batch_is_not_written(tmp_path, batch, rows_of, change, message):
    with pytest.raises(ValueError, match=message):
        write_reward_dump(**{"path": tmp_path / "x", "batch": batch, "parts": {}, "rows": rows_of(batch), **change})
    assert not list(tmp_path.iterdir())


def _header(path, change):
    """Rewrite the file's JSON header."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable reward dump"),
        (lambda path: path.write_bytes(b""), "not a readable reward dump"),
        (lambda path: path.write_bytes(b"\x80\x04pickle" * 50), "not a readable reward dump"),
        (lambda path: path.unlink(), "not a readable reward dump"),
        (lambda path: _header(path, lambda h: h["__metadata__"].update(version="9")), "version 9; .* versions 1 and 2"),
        (lambda path: _header(path, lambda h: h.pop("__metadata__")), "not a reward dump; its format is None"),
        (lambda path: _header(path, lambda h: h.update(sid=h.pop("side"))), "a damaged reward dump .KeyError: 'side'"),
        (lambda path: _header(path, lambda h: h.update({"part:x": h.pop("part:score")})), "a damaged reward dump"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"rows": [', b'"rows": {')), "JSONDecodeError"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"text"', b'"txet"')), "'text'.* is missing"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'{"a": 1}', b'["a", 1]')), "must be a mapping; got"),
    ],
)
def test_a_damaged_file_is_named(dumped, batch, damage, message):
    path = dumped(batch, kwargs={"a": 1})
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        read_reward_dump(path)
    assert str(path) in str(caught.value)


def test_rows_that_are_on_no_side_are_damage(dumped, batch):
    path = dumped(batch)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**tensors, "query_rows": tensors["target_rows"].clone()}, path, metadata=metadata)
    with pytest.raises(DataError, match="query_rows and target_rows must have every row once"):
        read_reward_dump(path)


def test_dumps_are_found_by_step_in_a_run_its_rollouts_or_as_a_file(tmp_path):
    rollouts = tmp_path / "rl" / "rollouts"
    rollouts.mkdir(parents=True)
    for name in (dump_name(10), dump_name(2), dump_name(9, 1), dump_name(9, 0), "10.jsonl", "x.rewards.safetensors"):
        (rollouts / name).touch()
    for run in (tmp_path, tmp_path / "rl", rollouts):
        assert [step for step, _ in find_dumps(run)] == ["2", "9.0", "9.1", "10"]
    assert find_dumps(rollouts / dump_name(9, 1)) == [("9.1", rollouts / dump_name(9, 1))]
    (tmp_path / "rollouts").mkdir()
    assert len(find_dumps(tmp_path)) == 4
    (tmp_path / "rollouts" / dump_name(1)).touch()
    with pytest.raises(DataError, match="has dumps of several runs"):
        find_dumps(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"has no reward dump .*trainer.rollout_data_dir"):
        find_dumps(empty)
    with pytest.raises(DataError, match="there is no .*gone"):
        find_dumps(tmp_path / "gone")
