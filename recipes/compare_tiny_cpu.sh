#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Variants of EG-RL compared on the digits world: every variant, every seed, on the same data; then one table and plot.
#
#   bash recipes/compare_tiny_cpu.sh [hydra overrides of every RL stage]                          # the paper's ablations
#   VARIANTS="no_judge paper outcome_only public_code" SEEDS="0 1 2" bash recipes/compare_tiny_cpu.sh
#
# VARIANTS, the first is what the others are compared with: full (the main job), no_evidence (nothing that a T-CoT points at
# is cut out for the Embedder), answer_only (no thinking either), no_softmax (negatives weigh the same), or a file of reward/
# (paper: with the process reward of a judge). The raw input is in every run's evaluation.
# SEEDS="0 1 2 3 4", STEPS=40, OUT=runs/ablations. A seed's world, pretrained models and judge are made once, in OUT/base,
# and linked into OUT/<variant>/seed<n>; a variant whose T-CoTs differ pretrains on its own. 5 minutes a run on two quiet
# cores, with a judge 15; finished runs are not run again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

read -ra VARIANTS <<<"${VARIANTS:-full no_evidence answer_only no_softmax}"
read -ra SEEDS <<<"${SEEDS:-0 1 2 3 4}"
OUT=$(realpath -m "${OUT:-$ROOT/runs/ablations}")
export STEPS=${STEPS:-40}
TINY="$RECIPES/run_egrl_tiny_cpu.sh"

for list in "${VARIANTS[*]}" "${SEEDS[*]}"; do
    twice=$(tr ' ' '\n' <<<"$list" | sort | uniq -d)
    [[ -z "$twice" ]] || fail 2 "VARIANTS and SEEDS must name each one once; $(tr '\n' ' ' <<<"$twice")is there twice"
done
((${#VARIANTS[@]} > 1)) || fail 2 "VARIANTS must name two or more variants to compare; got ${VARIANTS[*]}"
JUDGE=0
for variant in "${VARIANTS[@]}"; do
    case "$variant" in
        full | no_evidence | answer_only | no_softmax) ;;
        paper | public_code) JUDGE=1 ;;
        *) [[ -f "$ROOT/reward/$variant.py" ]] || fail 2 "VARIANTS names $variant, but there is no reward/$variant.py" ;;
    esac
done

is_dry_run || lock_out
set_up_cpu
export PYTHON
for seed in "${SEEDS[@]}"; do
    export SEED=$seed
    base="$OUT/base/seed$seed"
    UNTIL=judge JUDGE=$JUDGE OUT="$base" bash "$TINY"
    for variant in "${VARIANTS[@]}"; do
        tcot=full reward=no_judge weights=()
        shared=(models world sft embedder) stages=(world pretrain)
        case "$variant" in
            full) ;;
            no_evidence | answer_only) tcot=$variant shared=(models world) stages=(world) ;;
            no_softmax) weights=("+reward.custom_reward_function.reward_kwargs={temperature: 1.0e6}") ;;
            *)
                reward=$variant
                ((JUDGE == 0)) || { shared+=(judge) && stages+=(judge); }
                ;;
        esac
        folder="$OUT/$variant/seed$seed"
        mkdir -p "$folder/.stages"
        for part in "${shared[@]}"; do ln -sfn "$base/$part" "$folder/$part"; done
        for stage in "${stages[@]}"; do cp "$base/.stages/$stage" "$folder/.stages/$stage"; done
        say "variant $variant, seed $seed"
        TCOT=$tcot OUT="$folder" REWARD="$ROOT/reward/$reward.py" bash "$TINY" "${weights[@]}" "$@"
    done
done

RUNS=()
for variant in "${VARIANTS[@]}"; do
    list=$(printf ",$OUT/$variant/seed%s" "${SEEDS[@]}")
    RUNS+=("$variant=${list:1}")
done
"$PYTHON" "$ROOT/benchmarks/compare_table.py" "$OUT" "${RUNS[@]}"
