#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Reward functions compared on the digits world: every reward, every seed, from the same models; then one table and plot.
#
#   bash recipes/compare_rewards_tiny_cpu.sh [hydra overrides of every RL stage]
#
# REWARDS="no_judge paper outcome_only public_code" (files of reward/, the first is what the others are compared with),
# SEEDS="0 1 2", STEPS=40, OUT=runs/rewards. A seed's world and pretrained models are made once, in OUT/base, and linked
# into OUT/<reward>/seed<n>. About 15 minutes a run on two cores; finished runs are not run again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read -ra REWARDS <<<"${REWARDS:-no_judge paper outcome_only public_code}"
read -ra SEEDS <<<"${SEEDS:-0 1 2}"
OUT=$(realpath -m "${OUT:-$ROOT/runs/rewards}")
export STEPS=${STEPS:-40}
TINY="$RECIPES/run_egrl_tiny_cpu.sh"

((${#REWARDS[@]} > 1)) || fail 2 "REWARDS must name two or more reward functions to compare; got ${REWARDS[*]}"
for reward in "${REWARDS[@]}"; do
    [[ -f "$ROOT/reward/$reward.py" ]] || fail 2 "REWARDS names $reward, but there is no reward/$reward.py"
done

is_dry_run || lock_out
set_up_cpu
export PYTHON
for seed in "${SEEDS[@]}"; do
    UNTIL=judge JUDGE=1 SEED=$seed OUT="$OUT/base/seed$seed" bash "$TINY"
    for reward in "${REWARDS[@]}"; do
        folder="$OUT/$reward/seed$seed"
        mkdir -p "$folder/.stages"
        for part in models world sft embedder judge; do
            ln -sfn "$OUT/base/seed$seed/$part" "$folder/$part"
        done
        for stage in world pretrain judge; do
            cp "$OUT/base/seed$seed/.stages/$stage" "$folder/.stages/$stage"
        done
        say "reward $reward, seed $seed"
        SEED=$seed OUT="$folder" REWARD="$ROOT/reward/$reward.py" bash "$TINY" "$@"
    done
done

RUNS=()
for reward in "${REWARDS[@]}"; do
    list=$(printf ",$OUT/$reward/seed%s" "${SEEDS[@]}")
    RUNS+=("$reward=${list:1}")
done
"$PYTHON" "$ROOT/benchmarks/reward_table.py" "$OUT" "${RUNS[@]}"
