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

FAMILY=qwen3_vl MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}
OFFLOAD=${OFFLOAD:-True} # beside Megatron's unsharded gradients the GPUs are full without
source "$RECIPES/gpu.sh"

# Over four GPUs TP 2 x PP 2, over fewer 1 x 1.
SPLIT=$((NNODES * GPUS_PER_NODE < 4 ? 1 : 2))
ACTOR_TP=${ACTOR_TP:-$SPLIT} ACTOR_PP=${ACTOR_PP:-$SPLIT}
whole_numbers ACTOR_TP ACTOR_PP
OVERRIDES+=(
    model_engine=megatron # of verl; the Embedder stays on FSDP2, it is another process
    # The FSDP keys of egrl_trainer.yaml, in Megatron's terms.
    actor_rollout_ref.actor.strategy=megatron
    actor_rollout_ref.ref.strategy=megatron
    '~actor_rollout_ref.actor.grad_clip'
    actor_rollout_ref.actor.optim.clip_grad=1.0
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=$ACTOR_TP"
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=$ACTOR_PP"
    "actor_rollout_ref.ref.megatron.tensor_model_parallel_size=$ACTOR_TP"
    "actor_rollout_ref.ref.megatron.pipeline_model_parallel_size=$ACTOR_PP"
    # Else a micro-batch of 32k tokens keeps 36 GB of activations (TP 2, PP 2), and two are in flight.
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
    actor_rollout_ref.model.use_fused_kernels=False # Megatron's own, which verl has with another back end
    "actor_rollout_ref.actor.megatron.param_offload=$OFFLOAD"
    "actor_rollout_ref.actor.megatron.optimizer_offload=$OFFLOAD"
    actor_rollout_ref.ref.megatron.param_offload=True
)
run_egrl "$@"
