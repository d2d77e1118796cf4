#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# EG-RL of Qwen3-VL: Megatron actor, vLLM rollout.
#
#   EMBEDDER_PATH=/models/embedder TRAIN_FILES=/data/train.parquet VAL_FILES=/data/val.parquet MEDIA_ROOT=/data/media \
#       bash recipes/run_egrl_qwen3vl_megatron.sh [hydra overrides]
#
# One node of 8 GPUs unless NNODES and GPUS_PER_NODE say otherwise; several nodes: RAY_ADDRESS of a running cluster,
# or NODE_RANK and MASTER_ADDR on every node. Batch: PAIRS=32 x 2 sides x G=8. DRY_RUN=1 prints the plan only.
# The actor is split over ACTOR_TP=2 x ACTOR_PP=2 GPUs (1 x 1 below four GPUs).
# Needs Megatron-Core and Megatron-Bridge: docs/gpu.md.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}
run_gpu_recipe qwen3_vl megatron "$@"
