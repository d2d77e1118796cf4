# SPDX-License-Identifier: Apache-2.0
"""A user's reward function is loaded by path like verl's, and its mistakes are told with file and line."""

from functools import partial

import pytest
import torch

from embedrl_verl.errors import ConfigError, EmbedderError
from embedrl_verl.rewards.load import load_reward_function
from embedrl_verl.rewards.score import call_reward_function

NAN = float("nan")


def _write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_file_by_path_by_url_and_with_another_name(tmp_path):
    path = _write(tmp_path, "def compute_score(batch):\n    return 1\ndef other(batch):\n    return 2\n")
    for spec, value in ((path, 1), (f"file://{path}", 1), (f"{path}:other", 2), (f"file://{path}:other", 2)):
        function, where = load_reward_function(spec)
        assert function(None) == value
        assert where.endswith("mine.py:other" if value == 2 else "mine.py:compute_score")


def test_a_module_of_a_package_in_both_spellings():
    from embedrl_verl.rewards.functions.no_judge import compute_score

    for spec in ("embedrl_verl.rewards.functions.no_judge", "embedrl_verl/rewards/functions/no_judge"):
        assert load_reward_function(f"pkg://{spec}")[0] is compute_score
    function, where = load_reward_function("pkg://embedrl_verl.rewards.score:row_scores")
    assert function.__name__ == "row_scores" and where == "pkg://embedrl_verl.rewards.score:row_scores"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def compute_score(batch:\n", r"mine.py cannot be imported: SyntaxError in line 1: '\(' was never closed"),
        ("x = 1\nimport nowhere_at_all\n", "mine.py cannot be imported in line 2: ModuleNotFoundError: No module"),
        ("import sys\nsys.exit(0)\n", "mine.py cannot be imported in line 2: SystemExit: 0"),
        ("raise ValueError('no')\n", "mine.py cannot be imported in line 1: ValueError: no"),
        ("def score(batch): pass\n", r"mine.py must have a function compute_score\(batch, .*; it has score"),
        ("compute_score = 3\n", r"must have a function compute_score\(.*; it has none"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward_function(_write(tmp_path, text))
    assert caught.value.exit_code == 2


def test_what_is_no_python_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no reward function file .*gone.py; name a file, or pkg://"):
        load_reward_function(str(tmp_path / "gone.py"))
    with pytest.raises(ConfigError, match="there is no reward function file"):
        load_reward_function(f"{tmp_path}/gone.py:compute_score")
    with pytest.raises(ConfigError, match="must be a Python file"):
        load_reward_function(_write(tmp_path, "x", name="mine.txt"))
    with pytest.raises(ConfigError, match="pkg://no.such.package cannot be imported: ModuleNotFoundError"):
        load_reward_function("pkg://no.such.package")


def test_parts_become_float32_and_nan_stays(make_batch):
    batch = make_batch(1, 2)
    parts = call_reward_function(lambda _: {"score": [1, NAN, 0.5, True], "part": torch.arange(4)}, batch, "f")
    assert {name: value.dtype for name, value in parts.items()} == {"score": torch.float32, "part": torch.float32}
    assert parts["score"].isnan().tolist() == [False, True, False, False]
    grown = torch.ones(4, dtype=torch.float64, requires_grad=True)
    assert not call_reward_function(lambda _: {"score": grown}, batch, "f")["score"].requires_grad


def test_an_async_function_is_awaited(make_batch):
    async def score(batch):
        return {"score": torch.full((len(batch),), 2.0)}

    assert call_reward_function(score, make_batch(1, 1), "f")["score"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"reward": [0.0] * 4}, "f must return a mapping with the key 'score'; got the keys reward"),
        (torch.zeros(4), "f must return a mapping with the key 'score'; got Tensor"),
        (None, "got NoneType"),
        ({"score": torch.zeros(3)}, r"f: part 'score' must have one value per row, shape \(4,\); got \(3,\)"),
        ({"score": torch.zeros(4, 1)}, r"got \(4, 1\)"),
        ({"score": torch.zeros(4), "x": 1.0}, r"f: part 'x' must have one value per row, shape \(4,\); got \(\)"),
        ({"score": ["a"] * 4}, "f: part 'score' must be one number per row; got list"),
        ({"score": None}, "f: part 'score' must be one number per row; got NoneType"),
        ({"score": [float("inf")] * 4}, "f: part 'score' has an infinite value; use NaN for an unknown row"),
    ],
)
def test_a_result_that_is_not_one_number_a_row_is_refused(make_batch, result, message):
    with pytest.raises(ConfigError, match=message):
        call_reward_function(lambda _: result, make_batch(1, 2), "f")


def test_an_error_of_the_function_is_told_with_its_line(tmp_path, make_batch):
    text = (
        "def helper(batch):\n    return batch.nothing\n\ndef compute_score(batch, weight=1):\n    return helper(batch)"
    )
    function, where = load_reward_function(_write(tmp_path, text))
    for bound in (
        function,
        partial(function, weight=2),
        partial(lambda raw, kw, batch: raw(batch, **kw), function, {}),
    ):
        with pytest.raises(ConfigError, match="mine.py:compute_score failed in line 2: AttributeError: .*'nothing'"):
            call_reward_function(bound, make_batch(1, 1), where)
    with pytest.raises(ConfigError, match="compute_score: reward_kwargs has no key wieght; its keys are weight"):
        call_reward_function(partial(function, wieght=2), make_batch(1, 1), where)


def test_errors_of_this_package_are_raised_as_they_are(make_batch):
    def score(batch):
        raise EmbedderError("the judge is dead")

    with pytest.raises(EmbedderError, match="the judge is dead"):
        call_reward_function(score, make_batch(1, 1), "f")
