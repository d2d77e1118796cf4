# SPDX-License-Identifier: Apache-2.0
"""Asking a model about every row of a data set: T-CoTs (`embedrl data annotate`) and verdicts (`embedrl data filter`).

Imports neither torch, verl nor ray.

| module | |
|---|---|
| `rows`, `answers` | the input, streamed; all answers in one file, so that a killed job loses and doubles nothing |
| `runner` | keeps as many requests in flight as the server takes, and stops when too much fails |
| `backends`, `engine` | an OpenAI-style server, or vLLM in this process |
| `questions`, `prompts`, `replies` | what is asked, and whether a reply is a T-CoT with evidence that holds |
| `tcots`, `annotated` | T-CoTs: the questions, and the records with them |
| `relevance`, `verdicts`, `verdict_file` | the judge of pairs: the questions, and the file of its verdicts |
| `job` | what the two commands share |
"""
