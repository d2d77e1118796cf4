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

FAMILY=qwen2_vl MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2-VL-7B-Instruct}
source "$RECIPES/gpu.sh"

OVERRIDES+=(
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.ref.strategy=fsdp2
    actor_rollout_ref.ref.fsdp_config.param_offload=True # the reference model rests on the CPU between uses
    "actor_rollout_ref.actor.fsdp_config.param_offload=$OFFLOAD"
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=$OFFLOAD"
)
run_egrl "$@"
