# SPDX-License-Identifier: Apache-2.0
"""Asking a model about every row of a data set: T-CoTs (`embedrl data annotate`) and verdicts (`embedrl data filter`).

    rows -> job (prompts -> backends | engine -> replies) -> answers -> tcots | verdicts

Imports neither torch, verl nor ray.
"""
