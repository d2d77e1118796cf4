# SPDX-License-Identifier: Apache-2.0
"""The process reward (method section 4, eq. 4): lists, prompts and the client of a judge. Neither verl nor Ray is
imported.

`judge_lists` says whom the judge chooses from, `judge_messages` what it reads, `ListwiseJudge` asks it.
"""

from embedrl_verl.config.schema import JudgeConfig as JudgeSettings
from embedrl_verl.judge.answer import parse_choice
from embedrl_verl.judge.candidates import JudgeList, judge_lists
from embedrl_verl.judge.images import image_urls
from embedrl_verl.judge.judgement import Judgement
from embedrl_verl.judge.listwise import ListwiseJudge
from embedrl_verl.judge.prompt import JudgePrompt, judge_messages, judge_prompt
from embedrl_verl.judge.style import JUDGE_STYLES, JudgeStyle, load_judge_style, parse_judge_style

__all__ = [
    "JUDGE_STYLES",
    "JudgeList",
    "JudgePrompt",
    "JudgeSettings",
    "JudgeStyle",
    "Judgement",
    "ListwiseJudge",
    "image_urls",
    "judge_lists",
    "judge_messages",
    "judge_prompt",
    "load_judge_style",
    "parse_choice",
    "parse_judge_style",
]
