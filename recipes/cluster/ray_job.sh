#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Any GPU recipe as a job of a Ray cluster that runs already (KubeRay, a cloud launcher, `ray start`).
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 NNODES=4 EMBEDDER_PATH=/models/embedder TRAIN_FILES=/data/train.parquet \
#       bash recipes/cluster/ray_job.sh recipes/run_egrl_qwen3vl.sh [hydra overrides]
#
# REPO is this repository's folder on the cluster's nodes (default: as here); models, data and OUT are paths there. The
# job's driver runs on the head, which needs no GPU. DRY_RUN=1 prints the command.
set -euo pipefail

if (($# == 0)); then
    echo "usage: [VARIABLES] bash recipes/cluster/ray_job.sh RECIPE [hydra overrides]" >&2
    exit 2
fi
REPO=${REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
RECIPE=$1
shift
# What the recipes read (docs/configuration.md), as far as it is set here.
KNOBS=(ATTENTION CLIP EMBEDDER_PATH EMBEDDER_PROFILE G GPUS_PER_NODE HF_HUB_OFFLINE JUDGE_GPUS_PER_NODE JUDGE_PATH JUDGE_TP
    JUDGE_URLS KL LOGGER LR MEDIA_ROOT MODE MODEL_PATH NNODES OFFLOAD OUT PAIRS PYTHON REWARD ROLLOUT_GPUS_PER_NODE ROLLOUT_NNODES
    ROLLOUT_TP STEPS TEMPERATURE TENSORBOARD_DIR TRAIN_FILES VAL_FILES WANDB_DIR ACTOR_TP ACTOR_PP)
WORDS=(cd "$REPO" "&&" env "RAY_ADDRESS=auto")
for name in "${KNOBS[@]}"; do
    [[ -z "${!name:-}" ]] || WORDS+=("$(printf '%q' "$name=${!name}")")
done
WORDS+=(bash "$(printf '%q' "$RECIPE")")
for word in "$@"; do
    WORDS+=("$(printf '%q' "$word")")
done
COMMAND=("${RAY:-ray}" job submit -- bash -c "${WORDS[*]}")
if [[ -n "${DRY_RUN:-}" && "$DRY_RUN" != 0 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
else
    exec "${COMMAND[@]}"
fi
