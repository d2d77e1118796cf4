# SPDX-License-Identifier: Apache-2.0
import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.judge import JudgeSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hard_pairs", 0),
        ("style", "long"),
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("deadline_s", 0.0),
        ("max_unknown_share", 1.5),
        ("extra_body", {"messages": []}),
        ("model", ""),
    ],
)
def test_settings_that_cannot_work_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=f"embedrl.judge.{key}"):
        JudgeSettings(**{key: value})
