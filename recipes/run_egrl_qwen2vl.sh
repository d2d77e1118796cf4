#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# EG-RL of Qwen2-VL: FSDP2 actor, vLLM rollout.
#
#   EMBEDDER_PATH=/models/embedder TRAIN_FILES=/data/train.parquet VAL_FILES=/data/val.parquet MEDIA_ROOT=/data/media \
#       bash recipes/run_egrl_qwen2vl.sh [hydra overrides]
#
# One node of 8 GPUs unless NNODES and GPUS_PER_NODE say otherwise; several nodes: RAY_ADDRESS of a running cluster,
# or NODE_RANK and MASTER_ADDR on every node. Batch: PAIRS=32 x 2 sides x G=8. DRY_RUN=1 prints the plan only.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2-VL-7B-Instruct}
run_gpu_recipe qwen2_vl fsdp "$@"
