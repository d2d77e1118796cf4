#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 1: contrastive training of an Embedder on pair records with T-CoTs and evidence (docs/embedder.md).
#
#   TRAIN_FILES=train.parquet VAL_FILES=val.parquet bash recipes/run_embedder_contrastive.sh [hydra overrides]
#
# Any Qwen-VL checkpoint can become one: if it lacks the token <emb>, a copy with it is made first. A run that is broken
# off goes on from its last checkpoint when the recipe is started again. At the end OUT/embedder is a Hugging Face folder
# for transformers, sentence-transformers, vLLM and EG-RL.
#
# MODEL_PATH, FAMILY (of the model that wrote the T-CoTs), TRAIN_FILES, VAL_FILES, MEDIA_ROOT, OUT, PAIRS=512,
# SUB_PAIRS=256, LORA_RANK=64 (0: all weights), LR=1e-4, EPOCHS=2, TCOT=True, GPUS_PER_NODE=8, and for several nodes
# NNODES, NODE_RANK and MASTER_ADDR with the recipe started on each and OUT on a shared disk. DRY_RUN=1 checks and prints the plan.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-2B-Instruct} FAMILY=${FAMILY:-qwen3_vl}
TRAIN_FILES=${TRAIN_FILES:-data/train.parquet} VAL_FILES=${VAL_FILES:-} MEDIA_ROOT=${MEDIA_ROOT:-}
OUT=${OUT:-$PWD/runs/embedder_contrastive}
PAIRS=${PAIRS:-512} SUB_PAIRS=${SUB_PAIRS:-256} LORA_RANK=${LORA_RANK:-64} LR=${LR:-1e-4} EPOCHS=${EPOCHS:-2}
TCOT=${TCOT:-True}
whole_numbers NNODES GPUS_PER_NODE PAIRS SUB_PAIRS EPOCHS
[[ "$LORA_RANK" == 0 ]] || whole_numbers LORA_RANK
numbers LR

require_gpus
choose_python
if ((NNODES > 1)) && ! is_dry_run && [[ -z "${NODE_RANK:-}" || -z "${MASTER_ADDR:-}" ]]; then
    fail 2 "NNODES=$NNODES: start this recipe on every node with NODE_RANK=0..$((NNODES - 1)) and MASTER_ADDR=the" \
        "first node's address"
fi

OVERRIDES=(
    "data.train_files=$(hydra_list "$TRAIN_FILES")"
    "data.tcot=$TCOT"
    "data.embedrl.family=$FAMILY"
    "embedrl.embedder.train.lr=$LR"
    "embedrl.embedder.train.lora_rank=$LORA_RANK"
    "embedrl.embedder.train.lora_alpha=$((2 * LORA_RANK))"
    "contrastive.out='$OUT'"
    "contrastive.batch_pairs=$PAIRS"
    "contrastive.sub_batch_pairs=$SUB_PAIRS"
    "contrastive.epochs=$EPOCHS"
)
[[ -z "$VAL_FILES" ]] || OVERRIDES+=("data.val_files=$(hydra_list "$VAL_FILES")")
[[ -z "$MEDIA_ROOT" ]] || OVERRIDES+=("data.media_root='$MEDIA_ROOT'")

if is_dry_run; then
    DRY_RUN=1 "$PYTHON" -m embedrl_verl.stage1 "embedrl.embedder.path='$MODEL_PATH'" "${OVERRIDES[@]}" "$@"
    exit
fi

[[ "$MODEL_PATH" != [/.]* || -d "$MODEL_PATH" ]] ||
    fail 2 "MODEL_PATH must be a folder, or a hub id OWNER/NAME; there is no folder $MODEL_PATH"
((${NODE_RANK:-0})) || lock_out
own_tmp
# A copy with <emb> if the tokenizer has none, made by the first node; it appears as a whole.
if "$PYTHON" - "$MODEL_PATH" <<'PY'
import sys
from embedrl_verl.embedder.profiles import EMB_TOKEN, load_tokenizer, token_id
sys.exit(token_id(load_tokenizer(sys.argv[1]), EMB_TOKEN) is not None)
PY
then
    if [[ ! -d "$OUT/base" ]] && ((${NODE_RANK:-0} == 0)); then
        "$PYTHON" -m embedrl_verl.cli add-emb "$MODEL_PATH" --out "$OUT/base"
    fi
    until ((${NODE_RANK:-0} == 0)) || [[ -d "$OUT/base" ]]; do
        sleep 2
    done
    MODEL_PATH=$OUT/base
fi

LAUNCH=(--nproc-per-node "$GPUS_PER_NODE")
if ((NNODES > 1)); then
    LAUNCH+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    LAUNCH+=(--standalone)
fi
"$PYTHON" -m torch.distributed.run "${LAUNCH[@]}" -m embedrl_verl.stage1 \
    "embedrl.embedder.path='$MODEL_PATH'" "${OVERRIDES[@]}" "$@"

if ((${NODE_RANK:-0} == 0)); then
    STEP=$(cat "$OUT/checkpoints/latest_checkpointed_iteration.txt")
    "$PYTHON" -m embedrl_verl.cli export "$OUT/checkpoints/global_step_$STEP" --kind embedder --out "$OUT/embedder" --force
fi
