# SPDX-License-Identifier: Apache-2.0
"""The embedded default: tiny vision-language models and a world of real handwritten digits, all made on the spot.

Nothing is downloaded: models are built with random weights by `models`, the digits ship inside scikit-learn. The stages
are `models` -> `digits` -> `sft` -> `contrastive` -> (EG-RL by the recipe) -> `evaluate` -> `summary`, each one a
command `python -m embedrl_verl.tiny.<stage>`. Importing this package imports none of them.
"""
