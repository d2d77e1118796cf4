# SPDX-License-Identifier: Apache-2.0
"""`embedrl reward try` reports what another function would change, by hand-checked numbers, and imports no engine."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from embedrl_verl.cli import main
from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards.dump import RewardDump, dump_name
from embedrl_verl.rewards.functions import NEEDS
from embedrl_verl.rewards.trial import (
    grpo_advantages,
    largest_changes,
    parse_kwargs,
    parse_steps,
    score_dump,
    summarise,
)

NAN = float("nan")
OTHER_NAN = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)  # 0xffc00000, what 0 / 0 gives on x86
SPEC = "pkg://embedrl_verl.rewards.functions.no_judge"
OLD = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, NAN, 1.0]
# The rollout's number; row 4 is unknown: [0, 1, 0, 1, nan, 1, 0, 1].
MINE = """
import torch

def compute_score(batch, *, weight=1.0):
    score = weight * batch.rollout.float()
    first = (batch.side == 1) & (batch.pair == 0) & (batch.rollout == 0)
    return {"score": score.masked_fill(first, torch.nan), "length": batch.lengths}
"""


@pytest.fixture
def run(tmp_path, write):
    """A run with three dumped steps; step 2 has made-up scores, the others those of no_judge."""
    for step in (1, 2, 10):
        write(step, {"score": torch.tensor(OLD)} if step == 2 else None)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


@pytest.fixture
def tuned(tmp_path, write):
    """A run of no_judge that went on with other kwargs after its first step."""
    write(1, function=f"{SPEC}:compute_score", kwargs={"gamma": 0.3})
    write(2, function=f"{SPEC}:compute_score", kwargs={"gamma": 0.5, "accuracy": "all"})
    return tmp_path


@pytest.fixture
def reported(printed):
    return lambda *words: json.loads(printed(*words, "--json"))


def test_numbers_by_hand(run, reported):
    report = reported(run / "mine.py", "--dump", run, "--steps", "2")
    (step,) = report["steps"]
    assert (step["step"], step["rows"], step["groups"], step["identical"]) == ("2", 8, 4, False)
    assert step["mean"]["query"] == pytest.approx([0.5, 0.5])
    assert step["mean"]["target"] == pytest.approx([2 / 3, 2 / 3])
    assert step["unknown"] == [1, 1]
    # Known in both: rows 0 1 2 3 5 7, old 1 0 .5 .5 0 1, new 0 1 0 1 1 1.
    assert step["correlation"] == pytest.approx(-0.5 / (4 / 3) ** 0.5)
    # Advantages over 0.7071, of rows 0 1 2 3 (5 and 7 are alone in a group): old 1 -1 0 0, new -1 1 -1 1.
    assert step["advantage_correlation"] == pytest.approx(-(2**-0.5), abs=1e-5)
    assert step["sign_flips"] == pytest.approx(2 / 4)
    assert step["no_signal"] == [0.5, 0.25]  # old: q1 and t1 do not vary; new: t0, of which one row is left
    assert step["parts"] == {"length": 3.5}
    # New scores of q0, q1, t1: 0 and 1; of t0 one is known. Lengths of a group differ by 1.
    assert step["variance_within_groups"] == pytest.approx({"score": 0.5, "length": 0.5})
    assert report["all"] == {**step, "step": "all"}
    assert [(c["side"], c["rollout"]) for c in report["changes"]] == [("query", n) for n in (0, 1)] * 2
    first = report["changes"][0]
    assert (first["pair_id"], first["data_source"], first["score"]) == ("p0", "s", [1, 0])
    assert first["advantage"] == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)
    assert first["text"] == "words " * 200


def test_the_runs_own_function_is_identical(run, reported, printed):
    report = reported(SPEC, "--dump", run, "--steps", "1,10")
    assert report["all"]["identical"] and report["changes"] == [] and report["all"]["sign_flips"] == 0
    assert report["all"]["rows"] == 16 and report["run"] == ["the run's own"]
    assert report["all"]["advantage_correlation"] == pytest.approx(1.0)
    out = printed(SPEC, "--dump", run / "rollouts" / dump_name(1))
    assert "identical: every score is the run's own, bit for bit" in out and "largest changes" not in out
    assert "scores are the run's own, bit for bit, in 2 of 3 steps" in printed(SPEC, "--dump", run)


def test_the_runs_own_function_gets_the_kwargs_of_each_dump(tuned, reported, printed):
    report = reported(SPEC, "--dump", tuned)
    assert [step["identical"] for step in report["steps"]] == [True, True] and report["kwargs_of_run"]
    had = [f"{SPEC}:compute_score {kwargs}" for kwargs in ({"gamma": 0.3}, {"gamma": 0.5, "accuracy": "all"})]
    assert report["run"] == had and report["function"] == "; ".join(had)
    lines = printed(SPEC, "--dump", tuned, "--steps", "1").splitlines()[:4]
    assert lines[:2] == [f"tried:   {had[0]}", f"run had: {had[0]}"]
    assert lines[2:] == ["kwargs:  the run's, since this is its own function; --kwargs sets others", ""]


def test_kwargs_of_ones_own_and_other_functions_leave_the_runs_alone(tuned, reported, printed):
    report = reported(SPEC, "--dump", tuned, "--kwargs", "gamma=0.9")
    assert [step["identical"] for step in report["steps"]] == [False, False] and not report["kwargs_of_run"]
    assert report["function"] == f"{SPEC}:compute_score {{'gamma': 0.9}}"
    bare = reported(SPEC, "--dump", tuned, "--kwargs")
    assert bare["function"] == f"{SPEC}:compute_score" and not bare["all"]["identical"]
    other = reported("pkg://embedrl_verl.rewards.functions.outcome_only", "--dump", tuned)
    assert other["function"].endswith("outcome_only:compute_score") and not other["kwargs_of_run"]
    assert "kwargs:" not in printed(SPEC, "--dump", tuned, "--kwargs", "gamma=0.9")


def test_a_file_is_the_runs_own_however_it_is_spelt(tmp_path, write, trial_batch, reported, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "other.py"):
        (tmp_path / name).write_text(MINE + "\nagain = compute_score\n")
    score = 0.5 * trial_batch.rollout.float()
    score[4] = NAN
    write(1, {"score": score}, function=f"file://{tmp_path}/mine.py:compute_score", kwargs={"weight": 0.5})
    for spec in ("mine.py", "./mine.py:compute_score", f"{tmp_path}/mine.py", f"file://{tmp_path}/mine.py"):
        assert reported(spec, "--dump", tmp_path)["all"]["identical"], spec
    for spec in ("mine.py:again", "other.py"):
        assert not reported(spec, "--dump", tmp_path)["all"]["identical"], spec


def test_kwargs_of_the_run_that_the_function_no_longer_takes_are_named(tmp_path, write, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    write(1, {"score": torch.zeros(8)}, function=f"{tmp_path}/mine.py:compute_score", kwargs={"old": 1})
    assert main(["reward", "try", f"{tmp_path}/mine.py", "--dump", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "with the run's reward_kwargs {'old': 1} (--kwargs sets others): reward_kwargs has no key old" in error


def test_the_tables(run, printed):
    out = printed(f"{run}/mine.py:compute_score", "--dump", run, "--limit", "2", "--kwargs", "weight=0.5")
    lines = [line.split() for line in out.splitlines()]
    assert ["2", "8", "0.5000", "0.2500", "0.6667", "0.3333", "1", "1"] in [line[:8] for line in lines]
    assert [line[0] for line in lines if line and line[0] in ("1", "2", "10", "all")] == ["1", "2", "10", "all"]
    assert "tried:   " in out and "{'weight': 0.5}" in out and "run had: the run's own" in out
    assert "parts (mean): length 3.5000" in out
    assert out.count(", advantage ") == 2 and "pair p0, query, rollout 0: score 1.0000 -> 0.0000" in out
    shown = [line for line in out.splitlines() if line.startswith("    words")]
    assert 0 < len(shown) <= 6 and max(map(len, shown)) <= 114


def test_kwargs_are_read_as_hydra_does():
    words = ["a=1", "b=1e-3", "c=all", "d=true", "e=[1,2]", "f='x y'", "g=null", "h={k: 2}"]
    wanted = {"a": 1, "b": 1e-3, "c": "all", "d": True, "e": [1, 2], "f": "x y", "g": None, "h": {"k": 2}}
    assert parse_kwargs(words) == wanted


def test_steps_are_a_list_of_numbers_and_ranges():
    assert parse_steps("1,5-10, 12") == [range(1, 2), range(5, 11), range(12, 13)]


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [(parse_steps, text, "--steps must be a list like 1,5-10") for text in ("", "a", "1-", "1,,2", "-3", "1-2-3")]
    + [(parse_kwargs, [word], "KEY=VALUE words; got 'a") for word in ("a", "a.b=1")]
    + [(parse_kwargs, ["a=[1"], "cannot be read")],
)
def test_words_that_are_neither_are_refused(parse, value, message):
    with pytest.raises(ConfigError, match=message):
        parse(value)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["pkg://embedrl_verl.rewards.functions.paper"], 2, "needs a judge"),
        ([SPEC, "--kwargs", "bta=1"], 2, "no key bta"),
        (["mine.py", "--kwargs", "wieght=1"], 2, "reward_kwargs has no key wieght; its keys are weight"),
        (["mine.py", "--steps", "3-9"], 2, "--steps 3-9 names no dumped step"),
        (["mine.py", "--dump", "nowhere"], 3, "there is no nowhere"),
        (["mine.py", "--dump", "."], 3, "has no reward dump"),
        (["mine.py", "--dump", "damaged"], 3, "damaged: not a readable reward dump"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(run, capsys, monkeypatch, tmp_path_factory, words, code, message):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    Path("damaged").write_bytes((run / "rollouts" / dump_name(10)).read_bytes()[:-5])
    file = words[0] if words[0].startswith("pkg") else f"{run}/{words[0]}"
    dump = [] if "--dump" in words else ["--dump", str(run)]
    assert main(["reward", "try", file, *dump, *words[1:]]) == code
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(error)


def test_what_cannot_be_compared_is_shown_and_is_no_number(run, reported, printed):
    (run / "none.py").write_text("def compute_score(batch):\n    return {'score': [float('nan')] * 7 + [1]}\n")
    report = reported(run / "none.py", "--dump", run, "--steps", "2")
    assert report["all"]["mean"]["query"][1] is None and report["all"]["unknown"] == [1, 7]
    assert report["all"]["correlation"] is None and report["all"]["no_signal"] == [0.5, 1.0]
    (row,) = [line for line in printed(run / "none.py", "--dump", run, "--steps", "2").splitlines() if "100.0%" in line]
    assert row.split() == ["2", "8", "0.5000", "-", "0.6667", "1.0000", "1", "7", "-", "-", "-", "50.0%100.0%"]


def test_list_names_every_function_and_what_it_needs(capsys):
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(NEEDS) <= set(lines)
    assert lines["paper"].endswith("Needs a judge.") and lines["gain"].endswith("Needs raw embeddings.")


def test_the_guides_example_is_a_reward_function(run, reported):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    (run / "guide.py").write_text(guide.split("```python\n")[1].split("```")[0])
    report = reported(run / "guide.py", "--dump", run, "--steps", "1", "--kwargs", "weight=1.0")
    assert set(report["all"]["parts"]) == {"share", "few"} and report["all"]["unknown"] == [0, 0]
    assert all(f"| `{name}`" in guide for name in NEEDS)


# One step, compared.


@pytest.fixture
def trial(make_batch):
    """Tries a score on a made-up dump of 4 rows (one group a side) with another score."""

    def run(old, new, **change):
        rows = [{"pair_id": f"p{i}", "data_source": "s", "text": f"t{i}"} for i in range(4)]
        dump = RewardDump(make_batch(1, 2, rows=torch.arange(4)), {"score": torch.as_tensor(old)}, rows, "")
        return score_dump(lambda _: {"score": torch.as_tensor(new)}, "f", dump, **change)

    return run


def test_identical_is_bit_for_bit_but_unknown_is_unknown(trial):
    old = torch.tensor([0.0, 1.0, float("nan"), 0.1])
    other = torch.cat((old[:2], OTHER_NAN, old[3:]))
    for new, same in ((old, True), (other, True), (old.index_fill(0, torch.tensor([0]), -0.0), False)):
        assert summarise([trial(old, new)], "1")["identical"] is same
    assert not summarise([trial(old, old.nextafter(torch.ones(4)))], "1")["identical"]


def test_changes_of_several_steps_are_merged_by_size(trial):
    steps = [
        trial([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], step="2", limit=1),  # both target rows by 0.71, one is named
        trial([0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], step="1", limit=3),  # both query rows by 1.41
    ]
    named = [
        (change["step"], change["side"], change["rollout"], change["text"]) for change in largest_changes(steps, 9)
    ]
    assert named == [("1", "query", 0, "t0"), ("1", "query", 1, "t1"), ("2", "target", 0, "t2")]
    assert len(largest_changes(steps, 2)) == 2


def test_what_only_one_of_them_knows_is_counted_and_not_compared(trial):
    step = trial([0.0, 1.0, 0.0, 1.0], [0.0, float("nan"), 1.0, 0.0])
    found = summarise([step], "1")
    # Row 0 has a score of both, but from the second function no advantage: it is alone in its group.
    assert found["unknown"] == [0, 1] and found["sign_flips"] == 1.0
    assert {change["text"] for change in step.changes} == {"t2", "t3"}


def test_a_score_that_does_not_vary_has_no_correlation(trial):
    found = summarise([trial([0.1] * 4, [0.0, 1.0, 0.0, 1.0])], "1")
    assert found["correlation"] != found["correlation"] and found["no_signal"] == [1.0, 0.0]


def test_a_scored_step_lets_the_similarities_go(make_batch):
    batch = make_batch(1, 2)
    alive = weakref.ref(batch.similarity)
    dump = RewardDump(batch, {"score": torch.zeros(4)}, [{"pair_id": "p", "data_source": "s", "text": "t"}] * 4, "")
    step = score_dump(lambda b: {"score": torch.arange(4.0)}, "f", dump)
    assert alive() is not None
    del batch, dump
    gc.collect()
    assert alive() is None and len(step.changes) == 4


# What GRPO makes of scores.


def test_advantages_by_hand():
    score = torch.tensor([1.0, 3.0, 5.0, 5.0, 5.0, 5.0, NAN, 0.5])
    group = torch.tensor([7, 7, 2, 2, 2, 2, 7, 9])
    # Group 7 is 1 and 3: deviation sqrt(2). Group 2 does not vary. Group 9 is one row: nothing to compare with.
    half = 0.5**0.5
    wanted = torch.tensor([-half, half, 0.0, 0.0, 0.0, 0.0, NAN, NAN], dtype=torch.float64)
    torch.testing.assert_close(grpo_advantages(score, group), wanted, atol=2e-6, rtol=0, equal_nan=True)
    assert grpo_advantages(torch.full((3,), NAN), torch.zeros(3, dtype=torch.int64)).isnan().all()


def test_known_rows_have_verls_advantages_of_a_group_without_the_unknown_ones():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(0)
    group = torch.randperm(60, generator=generator) % 9
    score = torch.randn(60, generator=generator)
    score[torch.rand(60, generator=generator) < 0.2] = NAN
    known = ~score.isnan()
    assert 2 <= torch.bincount(group[known]).min() < torch.bincount(group).max()
    wanted, _ = core_algos.compute_grpo_outcome_advantage(
        score[known][:, None].clone(),
        torch.ones(int(known.sum()), 1),
        group[known].numpy(),
        norm_adv_by_std_in_grpo=True,
    )
    got = grpo_advantages(score, group)
    assert got.isnan().equal(score.isnan())
    torch.testing.assert_close(got[known].float(), wanted[:, 0], atol=1e-5, rtol=1e-5)
