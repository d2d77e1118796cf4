# SPDX-License-Identifier: Apache-2.0
"""Asking a model about every row of a data set: T-CoTs (`embedrl data annotate`) and verdicts (`embedrl data filter`).

Imports neither torch, verl nor ray.

| module | |
|---|---|
| `chunks` | the input in pieces of some thousand rows; bad rows and duplicate ids |
| `journal` | answers on the disk, so that a killed job loses and doubles nothing |
| `runner` | keeps as many requests in flight as the server takes |
| `progress` | settings and counts of a run, and when too much has failed |
| `backends`, `engine` | an OpenAI-style server, or vLLM in this process |
| `prompts`, `replies` | what is asked, and whether a reply is a T-CoT with evidence that holds |
| `job`, `assemble` | the command: settings, phases, output, data card |
"""
