# SPDX-License-Identifier: Apache-2.0
"""Asking a model about every row of a data set: T-CoTs (`embedrl data annotate`) and verdicts (`embedrl data filter`).

    rows -> runner (questions -> prompts -> backends | engine -> replies) -> answers -> annotated | verdicts

Imports neither torch, verl nor ray.
"""
