# SPDX-License-Identifier: Apache-2.0
"""Stage 1: contrastive training of an Embedder on pair records with T-CoTs and evidence (method section 5).

`python -m embedrl_verl.stage1` under torchrun, or alone for one device. The model runs on the same engine, in the same
worker class and with the same message builder as in EG-RL, so its checkpoints are those of co-training.
"""
