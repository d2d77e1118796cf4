# SPDX-License-Identifier: Apache-2.0
"""The process reward (method section 4, eq. 4): lists, prompts and the client of a judge. Neither verl nor Ray is
imported.

`judge_lists` says whom the judge chooses from, `judge_prompt` what it reads, `ListwiseJudge` asks it.
"""

from embedrl_verl.judge.judge import Judgement, ListwiseJudge, parse_choice
from embedrl_verl.judge.lists import JudgeList, judge_lists
from embedrl_verl.judge.prompt import JudgePrompt, image_urls, judge_prompt, judge_style

__all__ = [
    "JudgeList",
    "JudgePrompt",
    "Judgement",
    "ListwiseJudge",
    "image_urls",
    "judge_lists",
    "judge_prompt",
    "judge_style",
    "parse_choice",
]
