#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 1 on a machine without a GPU: a tiny Embedder is trained on the digits data with T-CoTs and evidence, and a second
# one, from the same weights and with as many updates, on the input alone. Sets up .venv first.
#
#   bash recipes/run_embedder_tiny_cpu.sh [hydra overrides of both trainings]
#
# Prints held-out Hit@1 of both by source. OUT/with_tcot/embedder and OUT/without/embedder are Hugging Face folders. A run
# that is broken off goes on from its last checkpoints.
#
# SEED=0, STEPS=200, OUT=runs/embedder_tiny_cpu/seed0, FAMILY=qwen2_vl.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED=${SEED:-0} STEPS=${STEPS:-200} FAMILY=${FAMILY:-qwen2_vl}
whole_numbers STEPS
OUT=${OUT:-$ROOT/runs/embedder_tiny_cpu/seed$SEED}

if ! is_dry_run; then
    lock_out
    own_tmp
fi
set_up_cpu

MADE="$FAMILY $SEED"
if [[ -f "$OUT/.made" && "$(cat "$OUT/.made")" != "$MADE" ]]; then
    fail 2 "OUT=$OUT holds models of FAMILY and SEED '$(cat "$OUT/.made")', not '$MADE'; choose another OUT"
fi
if [[ ! -f "$OUT/model/config.json" ]]; then
    tiny world "$OUT/world" --family "$FAMILY" --seed "$SEED"
    tiny models "$OUT/model" --family "$FAMILY" --seed "$((SEED + 1000))"
    echo "$MADE" >"$OUT/.made"
fi

# train_one NAME TCOT OVERRIDES...: one Embedder.
train_one() {
    local name=$1 tcot=$2 child
    shift 2
    trap 'kill "${child:-}" 2>/dev/null || true' TERM
    "$PYTHON" -m embedrl_verl.stage1 \
        "data.train_files=['$OUT/world/train_tcot.parquet']" \
        "data.val_files=['$OUT/world/heldout_tcot.parquet']" \
        "data.tcot=$tcot" \
        "data.embedrl.family=$FAMILY" \
        data.embedrl.image_min_tokens=4 data.embedrl.frame_min_tokens=4 \
        "embedrl.embedder.path='$OUT/model'" \
        embedrl.embedder.dtype=float32 \
        embedrl.embedder.image_min_tokens=4 embedrl.embedder.frame_min_tokens=4 \
        embedrl.embedder.max_tokens_per_gpu=4096 \
        embedrl.embedder.train.max_tokens_per_gpu=4096 \
        embedrl.embedder.train.gradient_checkpointing=False \
        embedrl.embedder.train.lora_rank=0 \
        embedrl.embedder.train.lr=1e-3 \
        embedrl.embedder.train.warmup_steps=20 \
        embedrl.embedder.train.temperature=0.05 \
        "contrastive.out='$OUT/$name'" \
        contrastive.batch_pairs=32 contrastive.sub_batch_pairs=32 \
        "contrastive.total_steps=$STEPS" \
        contrastive.save_freq=100 contrastive.test_freq=100 contrastive.log_freq=50 contrastive.num_workers=1 \
        "contrastive.seed=$SEED" "$@" &
    child=$!
    wait "$child"
    is_dry_run || "$PYTHON" -m embedrl_verl.cli export "$OUT/$name/checkpoints/global_step_$STEPS" --kind embedder \
        --out "$OUT/$name/embedder" --force
}

if is_dry_run; then
    train_one with_tcot True "$@"
    exit
fi

# Both at once, on one core each.
train_one with_tcot True "$@" > >(sed -u 's/^/[with T-CoT] /') 2>&1 &
WITH=$!
train_one without False "$@" > >(sed -u 's/^/[without]    /') 2>&1 &
WITHOUT=$!
end_both() { kill "$WITH" "$WITHOUT" 2>/dev/null; }
AT_EXIT+=(end_both)
wait "$WITH"
wait "$WITHOUT"
unset 'AT_EXIT[-1]'

"$PYTHON" "$ROOT/benchmarks/stage1_table.py" "$OUT"
