# SPDX-License-Identifier: Apache-2.0
"""`embedrl reward try` tells what another function would change, by hand-checked numbers, and imports no engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedrl_verl.cli import main
from embedrl_verl.cli_reward import parse_kwargs, parse_steps
from embedrl_verl.errors import ConfigError
from embedrl_verl.rewards import RewardBatch
from embedrl_verl.rewards.dump import dump_name, write_reward_dump
from embedrl_verl.rewards.functions import NEEDS, no_judge
from embedrl_verl.tcot import parse_tcot

NAN = float("nan")
WELL_FORMED = '<thinking>It says {"text_keywords": ["a"]}.</thinking><rethink>Yes.</rethink><answer>a</answer>'
OLD = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, NAN, 1.0]
# The rollout's number; row 4 is unknown: [0, 1, 0, 1, nan, 1, 0, 1].
MINE = """
import torch

def compute_score(batch, *, weight=1.0):
    score = weight * batch.rollout.float()
    first = (batch.side == 1) & (batch.pair == 0) & (batch.rollout == 0)
    return {"score": score.masked_fill(first, torch.nan), "length": batch.lengths}
"""


def _batch(**change):
    """Two pairs with two rollouts a side: q0 q0 q1 q1 t0 t0 t1 t1."""
    side, pair, rollout = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).T
    vectors = torch.eye(8)[pair] + 0.3 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {
        "side": side,
        "pair": pair,
        "rollout": rollout,
        "content": pair,
        "tcots": [parse_tcot(WELL_FORMED if i % 2 else "words " * 200) for i in range(8)],
        "required": ["text_keywords"] * 8,
        "embeddings": torch.nn.functional.normalize(vectors, dim=1),
        "lengths": torch.arange(8),
    }
    return RewardBatch.build(**{**arguments, **change})


def _write(folder, step, parts, *, function="the run's own", kwargs=None, **change):
    batch = _batch(**change)
    rows = [
        {"pair_id": f"bird-{pair}", "data_source": "birds", "text": tcot.text, "num_images": 0, "num_frames": 0}
        for pair, tcot in zip(batch.pair.tolist(), batch.tcots, strict=True)
    ]
    parts = parts or no_judge.compute_score(batch)
    path = folder / "rollouts" / dump_name(step)
    write_reward_dump(path, batch, parts, rows=rows, function=function, kwargs=kwargs)


@pytest.fixture
def run(tmp_path):
    """A run with three dumped steps; step 2 has made-up scores, the others those of no_judge."""
    for step in (1, 2, 10):
        _write(tmp_path, step, {"score": torch.tensor(OLD)} if step == 2 else None)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def _json(capsys, *words):
    assert main(["reward", "try", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_by_hand(run, capsys):
    report = _json(capsys, run / "mine.py", "--dump", run, "--steps", "2")
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
    assert report["all"] == {**step, "step": "all"}
    assert [(c["side"], c["rollout"]) for c in report["changes"][:2]] == [("query", 0), ("query", 1)]
    first = report["changes"][0]
    assert (first["pair_id"], first["data_source"], first["score"], len(report["changes"])) == (
        "bird-0",
        "birds",
        [1, 0],
        4,
    )
    assert first["advantage"] == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)
    assert first["text"] == "words " * 200


def test_the_runs_own_function_is_identical(run, capsys):
    spec = "pkg://embedrl_verl.rewards.functions.no_judge"
    report = _json(capsys, spec, "--dump", run, "--steps", "1,10")
    assert report["all"]["identical"] and report["changes"] == [] and report["all"]["sign_flips"] == 0
    assert report["all"]["rows"] == 16 and report["run"] == ["the run's own"]
    assert report["all"]["advantage_correlation"] == pytest.approx(1.0)
    assert main(["reward", "try", spec, "--dump", str(run / "rollouts" / dump_name(1))]) == 0
    out = capsys.readouterr().out
    assert "identical: every score is the run's own, bit for bit" in out and "largest changes" not in out
    assert main(["reward", "try", spec, "--dump", str(run)]) == 0
    assert "scores are the run's own, bit for bit, in 2 of 3 steps" in capsys.readouterr().out


SPEC = "pkg://embedrl_verl.rewards.functions.no_judge"


@pytest.fixture
def tuned(tmp_path):
    """A run of no_judge that went on with other kwargs after its first step."""
    for step, kwargs in ((1, {"gamma": 0.3}), (2, {"gamma": 0.5, "accuracy": "all"})):
        parts = no_judge.compute_score(_batch(), **kwargs)
        _write(tmp_path, step, parts, function=f"{SPEC}:compute_score", kwargs=kwargs)
    return tmp_path


def test_the_runs_own_function_gets_the_kwargs_of_each_dump(tuned, capsys):
    report = _json(capsys, SPEC, "--dump", tuned)
    assert [step["identical"] for step in report["steps"]] == [True, True] and report["kwargs_of_run"]
    had = [f"{SPEC}:compute_score {kwargs}" for kwargs in ({"gamma": 0.3}, {"gamma": 0.5, "accuracy": "all"})]
    assert report["run"] == had and report["function"] == "; ".join(had)
    assert main(["reward", "try", SPEC, "--dump", str(tuned), "--steps", "1"]) == 0
    told = capsys.readouterr().out.splitlines()[:4]
    assert told == [f"tried:   {had[0]}", f"run had: {had[0]}", told[2], ""]
    assert told[2] == "kwargs:  the run's, since this is its own function; --kwargs sets others"


def test_kwargs_of_ones_own_and_other_functions_leave_the_runs_alone(tuned, capsys):
    report = _json(capsys, SPEC, "--dump", tuned, "--kwargs", "gamma=0.9")
    assert [step["identical"] for step in report["steps"]] == [False, False] and not report["kwargs_of_run"]
    assert report["function"] == f"{SPEC}:compute_score {{'gamma': 0.9}}"
    bare = _json(capsys, SPEC, "--dump", tuned, "--kwargs")
    assert bare["function"] == f"{SPEC}:compute_score" and not bare["all"]["identical"]
    other = _json(capsys, "pkg://embedrl_verl.rewards.functions.outcome_only", "--dump", tuned)
    assert other["function"].endswith("outcome_only:compute_score") and not other["kwargs_of_run"]
    assert main(["reward", "try", SPEC, "--dump", str(tuned), "--kwargs", "gamma=0.9"]) == 0
    assert "kwargs:" not in capsys.readouterr().out


def test_a_file_is_the_runs_own_however_it_is_spelt(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "other.py"):
        (tmp_path / name).write_text(MINE + "\nagain = compute_score\n")
    score = 0.5 * _batch().rollout.float()
    score[4] = NAN
    _write(tmp_path, 1, {"score": score}, function=f"file://{tmp_path}/mine.py:compute_score", kwargs={"weight": 0.5})
    for spec in ("mine.py", "./mine.py:compute_score", f"{tmp_path}/mine.py", f"file://{tmp_path}/mine.py"):
        assert _json(capsys, spec, "--dump", tmp_path)["all"]["identical"], spec
    for spec in ("mine.py:again", "other.py"):
        assert not _json(capsys, spec, "--dump", tmp_path)["all"]["identical"], spec


def test_kwargs_of_the_run_that_the_function_no_longer_takes_are_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    _write(tmp_path, 1, None, function=f"{tmp_path}/mine.py:compute_score", kwargs={"old": 1})
    assert main(["reward", "try", f"{tmp_path}/mine.py", "--dump", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "with the run's reward_kwargs {'old': 1} (--kwargs sets others): reward_kwargs has no key old" in error


def test_the_tables(run, capsys):
    command = ["reward", "try", f"{run}/mine.py:compute_score", "--dump", str(run), "--limit", "2"]
    assert main([*command, "--kwargs", "weight=0.5"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["2", "8", "0.5000", "0.2500", "0.6667", "0.3333", "1", "1"] in [line[:8] for line in lines]
    assert [line[0] for line in lines if line and line[0] in ("1", "2", "10", "all")] == ["1", "2", "10", "all"]
    assert "tried:   " in out and "{'weight': 0.5}" in out and "run had: the run's own" in out
    assert "parts (mean): length 3.5000" in out
    assert out.count(", advantage ") == 2 and "pair bird-0, query, rollout 0: score 1.0000 -> 0.0000" in out
    shown = [line for line in out.splitlines() if line.startswith("    words")]
    assert 0 < len(shown) <= 6 and max(map(len, shown)) <= 114


def test_kwargs_are_read_as_hydra_does():
    words = ["a=1", "b=1e-3", "c=all", "d=true", "e=[1,2]", "f='x y'", "g=null", "h={k: 2}"]
    wanted = {"a": 1, "b": 1e-3, "c": "all", "d": True, "e": [1, 2], "f": "x y", "g": None, "h": {"k": 2}}
    assert parse_kwargs(words) == wanted
    for word, message in (
        ("a", "must be KEY=VALUE words; got 'a'"),
        ("a.b=1", "KEY=VALUE"),
        ("a=[1", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_kwargs([word])


def test_steps_are_a_list_of_numbers_and_ranges():
    assert parse_steps("1,5-10, 12") == [(1, 1), (5, 10), (12, 12)]
    for text in ("", "a", "1-", "1,,2", "-3", "1-2-3"):
        with pytest.raises(ConfigError, match="--steps must be a list like 1,5-10"):
            parse_steps(text)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["pkg://embedrl_verl.rewards.functions.paper"], 2, "needs a judge"),
        (["pkg://embedrl_verl.rewards.functions.gain"], 2, "set embedrl.reward.raw_embeddings=True"),
        (["pkg://embedrl_verl.rewards.functions.no_judge", "--kwargs", "bta=1"], 2, "no key bta"),
        (["mine.py", "--kwargs", "wieght=1"], 2, "reward_kwargs has no key wieght; its keys are weight"),
        (["mine.py:other"], 2, r"mine.py must have a function other\("),
        (["mine.py", "--steps", "3-9"], 2, "--steps 3-9 names no dumped step"),
        (["mine.py", "--steps", "x"], 2, "--steps must be a list"),
        (["mine.py", "--limit", "-1"], 2, "--limit must be 0 or more; got -1"),
        (["gone.py"], 2, "there is no reward function file .*gone.py"),
        (["broken.py"], 2, "broken.py cannot be imported: SyntaxError in line 1"),
        (
            ["shape.py"],
            2,
            r"shape.py:compute_score: part 'score' must have one value per row, shape \(8,\); got \(1,\)",
        ),
        (["mine.py", "--dump", "nowhere"], 3, "there is no nowhere"),
        (["mine.py", "--dump", "."], 3, "has no reward dump"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(run, capsys, monkeypatch, tmp_path_factory, words, code, message):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for name, text in (("broken.py", "def"), ("shape.py", "def compute_score(batch):\n    return {'score': [1.0]}\n")):
        (run / name).write_text(text)
    file = words[0] if words[0].startswith("pkg") else f"{run}/{words[0]}"
    dump = [] if "--dump" in words else ["--dump", str(run)]
    assert main(["reward", "try", file, *dump, *words[1:]]) == code
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(error)


def test_a_dump_without_lengths_is_the_functions_own_error(tmp_path, capsys):
    _write(tmp_path, 1, None, lengths=None)
    assert main(["reward", "try", "pkg://embedrl_verl.rewards.functions.length_shaped", "--dump", str(tmp_path)]) == 2
    assert "length_shaped needs the number of response tokens" in capsys.readouterr().err


def test_a_damaged_dump_ends_with_code_3(run, capsys):
    path = run / "rollouts" / dump_name(10)
    path.write_bytes(path.read_bytes()[:-5])
    assert main(["reward", "try", str(run / "mine.py"), "--dump", str(run)]) == 3
    assert f"{path}: not a readable reward dump" in capsys.readouterr().err


def test_unknown_everywhere_is_shown_and_is_no_number(run, capsys):
    (run / "none.py").write_text("def compute_score(batch):\n    return {'score': [float('nan')] * len(batch)}\n")
    report = _json(capsys, run / "none.py", "--dump", run, "--steps", "2")
    assert report["all"]["mean"]["mean"][1] is None and report["all"]["unknown"] == [1, 8]
    assert report["all"]["correlation"] is None and report["all"]["no_signal"] == [0.5, 1.0]
    assert main(["reward", "try", str(run / "none.py"), "--dump", str(run), "--steps", "2"]) == 0


def test_no_engine_is_imported(run):
    code = (
        "import sys\nfrom embedrl_verl.cli import main\n"
        f"main(['reward', 'try', {str(run / 'mine.py')!r}, '--dump', {str(run)!r}, '--kwargs', 'weight=2'])\n"
        "print('LOADED', sorted({n.split('.')[0] for n in sys.modules} & {'verl', 'ray', 'vllm', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout and "all" in done.stdout


def test_list_names_every_function_and_what_it_needs(capsys):
    assert main(["reward", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(NEEDS) <= set(lines)
    assert lines["paper"].endswith("Needs a judge.") and lines["gain"].endswith("Needs raw embeddings.")


def test_the_guides_example_is_a_reward_function(run, capsys):
    guide = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text()
    (run / "guide.py").write_text(guide.split("```python\n")[1].split("```")[0])
    report = _json(capsys, run / "guide.py", "--dump", run, "--steps", "1", "--kwargs", "weight=1.0")
    assert set(report["all"]["parts"]) == {"share", "few"} and report["all"]["unknown"] == [0, 0]
    assert all(f"| `{name}`" in guide for name in NEEDS)
