#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# EG-RL end to end on a machine without a GPU: real engines (verl, Ray, vLLM on the CPU), tiny models made on the spot,
# and scikit-learn's scans of handwritten digits as data. Sets up .venv first.
#
#   bash recipes/run_egrl_tiny_cpu.sh [hydra overrides of the RL stage]
#
# Stages: world (models and data) · pretrain (cold start of the Reasoner, and beside it the contrastive training of the
# Embedder) · judge (only for a reward that has one: a tiny instruct model learns to name the matching candidate, and
# verl serves it in the RL stage) · rl (EG-RL, the Embedder frozen) · export · evaluate (held-out Hit@1) · then the table, results.json and
# curves.png in OUT.
# A finished stage is skipped when the recipe is run again with the same settings; an interrupted RL stage goes on from
# its last checkpoint.
#
# SEED=0, STEPS=40 (of RL), OUT=runs/tiny_cpu/seed0, FAMILY=qwen2_vl, REWARD=reward/no_judge.py, JUDGE=1 with
# reward/paper.py and reward/public_code.py (else 0), UNTIL=<stage>: end after it. DRY_RUN=1 prints the plan of the RL stage only.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED=${SEED:-0} STEPS=${STEPS:-40} FAMILY=${FAMILY:-qwen2_vl}
OUT=${OUT:-$ROOT/runs/tiny_cpu/seed$SEED}
REWARD=${REWARD:-$ROOT/reward/no_judge.py}
case "$(basename "$REWARD")" in
    paper.py | public_code.py) JUDGE=${JUDGE:-1} ;;
    *) JUDGE=${JUDGE:-0} ;;
esac

export VERL_PLATFORM=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCH_COMPILE_DISABLE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind

if [[ -z "${PYTHON:-}" && -f "$ROOT/scripts/setup_env.sh" ]]; then
    bash "$ROOT/scripts/setup_env.sh"
    PYTHON="$ROOT/.venv/bin/python"
fi
choose_python

OVERRIDES=(
    platform=cpu
    "data.train_files='$OUT/world/train.parquet'"
    "data.val_files='$OUT/world/heldout.parquet'"
    data.train_batch_size=16
    data.max_prompt_length=256
    data.max_response_length=96
    "data.seed=$SEED"
    "data.embedrl.family=$FAMILY"
    data.embedrl.prompt_style=compact
    data.embedrl.pairs_together=4
    data.embedrl.image_min_tokens=4
    data.embedrl.image_max_tokens=768
    data.embedrl.frame_min_tokens=4
    data.embedrl.frame_max_tokens=300
    "actor_rollout_ref.model.path='$OUT/sft'"
    actor_rollout_ref.actor.ppo_mini_batch_size=8
    actor_rollout_ref.actor.optim.lr=5e-5
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.max_model_len=512
    "embedrl.embedder.path='$OUT/embedder'"
    embedrl.embedder.image_min_tokens=4
    embedrl.embedder.image_max_tokens=768
    embedrl.embedder.frame_min_tokens=4
    embedrl.embedder.frame_max_tokens=300
    "reward.custom_reward_function.path='$REWARD'"
    "trainer.total_training_steps=$STEPS"
    trainer.total_epochs=1000
    trainer.logger=[file]
    trainer.test_freq=-1
    trainer.save_freq=20
    trainer.max_actor_ckpt_to_keep=2
    "trainer.default_local_dir='$OUT/rl/checkpoints'"
    "trainer.rollout_data_dir='$OUT/rl/rollouts'"
    "trainer.validation_data_dir='$OUT/rl/validation'"
)

((JUDGE == 0)) || OVERRIDES+=(
    reward.reward_model.enable=True
    "reward.reward_model.model_path='$OUT/judge'"
    reward.reward_model.rollout.prompt_length=496
    reward.reward_model.rollout.max_model_len=512
    embedrl.judge.style=compact
    embedrl.judge.limit=64
)

if is_dry_run; then
    train "${OVERRIDES[@]}" "$@"
    exit
fi

STAGES=" world pretrain judge rl export evaluate "

forget_rl() { rm -rf "$OUT/rl" "$OUT"/metrics.jsonl*; }

# run_stage NAME COMMAND...: once for each command. What later stages made of an older result is void.
run_stage() {
    local name=$1 mark="$OUT/.stages/$1" started=$SECONDS stage
    shift
    if [[ -f "$mark" && "$(cat "$mark")" == "$*" ]]; then
        say "$name: done before"
        return
    fi
    rm -f "$mark"
    for stage in ${STAGES#*" $name "}; do
        rm -f "$OUT/.stages/$stage"
        [[ "$stage" != rl ]] || forget_rl
    done
    say "$name"
    "$@"
    printf '%s' "$*" >"$mark"
    say "$name took $((SECONDS - started)) s"
}

# The end, if UNTIL names this stage.
until_stage() { [[ "${UNTIL:-}" != "$1" ]] || exit 0; }

make_world() {
    "$PYTHON" -m embedrl_verl.tiny.models --out "$OUT/models/reasoner" --family "$1" --seed "$2"
    "$PYTHON" -m embedrl_verl.tiny.models --out "$OUT/models/embedder" --family "$1" --seed "$(($2 + 1000))"
    "$PYTHON" -m embedrl_verl.tiny.digits --out "$OUT/world" --family "$1" --seed "$2"
}

# Both at once, on one core each.
pretrain() {
    local reasoner embedder
    "$PYTHON" -m embedrl_verl.tiny.sft --model "$OUT/models/reasoner" --world "$OUT/world" --out "$OUT/sft" \
        --seed "$1" &
    reasoner=$!
    "$PYTHON" -m embedrl_verl.tiny.contrastive --model "$OUT/models/embedder" --world "$OUT/world" \
        --out "$OUT/embedder" --seed "$1" &
    embedder=$!
    trap 'kill "$reasoner" "$embedder" 2>/dev/null || true' EXIT
    wait "$reasoner"
    wait "$embedder"
    trap - EXIT
}

make_judge() {
    "$PYTHON" -m embedrl_verl.tiny.judge --world "$OUT/world" --out "$OUT/judge" --seed "$1"
}

# An interrupted run goes on from its last checkpoint, and so does a longer one; other settings start anew.
run_rl() {
    local settings
    settings=$(printf '%s\n' "$@" | grep -v '^trainer.total_training_steps=')
    if [[ -d "$OUT/rl" && "$(cat "$OUT/rl/settings")" != "$settings" ]]; then
        say "rl: other settings than before, starting anew"
        forget_rl
    fi
    mkdir -p "$OUT/rl"
    echo "$settings" >"$OUT/rl/settings"
    train "$@"
}

# The final weights as Hugging Face folders; a co-trained Embedder too.
export_models() {
    local step
    step="$OUT/rl/checkpoints/global_step_$(cat "$OUT/rl/checkpoints/latest_checkpointed_iteration.txt")"
    "$PYTHON" -m embedrl_verl.cli export "$step" --kind reasoner --out "$OUT/reasoner" --force
    rm -rf "$OUT/embedder_cotrained"
    [[ ! -d "$step/embedder" ]] ||
        "$PYTHON" -m embedrl_verl.cli export "$step" --kind embedder --out "$OUT/embedder_cotrained"
}

# By the Embedder that RL began with; a co-trained one beside it.
evaluate() {
    evaluate_by embedder evaluation.json
    [[ ! -d "$OUT/embedder_cotrained" ]] || evaluate_by embedder_cotrained evaluation_cotrained.json
}

evaluate_by() {
    "$PYTHON" -m embedrl_verl.tiny.evaluate --embedder "$OUT/$1" --world "$OUT/world" --before "$OUT/sft" \
        --after "$OUT/reasoner" --seed "$SEED" --out "$OUT/$2"
}

mkdir -p "$OUT/.stages"
start_fork_server
run_stage world make_world "$FAMILY" "$SEED"
run_stage pretrain pretrain "$SEED"
until_stage pretrain
((JUDGE == 0)) || run_stage judge make_judge "$SEED"
until_stage judge
run_stage rl run_rl "${OVERRIDES[@]}" "$@"
until_stage rl
run_stage export export_models
run_stage evaluate evaluate
"$PYTHON" -m embedrl_verl.tiny.summary --run "$OUT"
