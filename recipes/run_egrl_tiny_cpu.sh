#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# EG-RL end to end on a machine without a GPU: real engines (verl, Ray, vLLM on the CPU), tiny models made on the spot,
# and scikit-learn's scans of handwritten digits as data, or your own pairs. Sets up .venv first.
#
#   bash recipes/run_egrl_tiny_cpu.sh [hydra overrides of the RL stage]
#
# Stages: world (models and data) · pretrain (cold start of the Reasoner, and beside it the contrastive training of the
# Embedder) · judge (only for a reward that has one: a tiny instruct model learns to name the matching candidate, and
# verl serves it in the RL stage) · rl (EG-RL, the Embedder frozen) · export · evaluate (held-out Hit@1) · then the table, results.json and
# curves.png in OUT.
# A finished stage is skipped when the recipe is run again with the same settings; an interrupted RL stage goes on from
# its last checkpoint, and so does a longer one (STEPS). With other settings of the RL stage, or fewer steps than are done,
# what the earlier run left is moved to OUT/old-<n>; another SEED or FAMILY needs another OUT.
#
# TRAIN_FILES and VAL_FILES (parquet files or data set folders, separated by commas; docs/own_data.md), MEDIA_ROOT of their
# paths: train on your own pairs. The models learn the form of a T-CoT from the digits, and from T-CoTs of your pairs.
# SEED=0, STEPS=40 (of RL), PAIRS=8 (a step), PRETRAIN_STEPS=400, OUT=runs/tiny_cpu/seed0, FAMILY=qwen2_vl, qwen2_5_vl or qwen3_vl,
# TCOT=full, no_evidence (nothing that a T-CoT points at is cut out for the Embedder) or answer_only (no thinking either),
# REWARD=reward/no_judge.py, JUDGE=1 with reward/paper.py and reward/public_code.py (else 0), UNTIL=<stage>: end after it,
# LOGGER=console (a line a step), tensorboard or wandb, several by comma (docs/logs.md). DRY_RUN=1 prints the plan of the RL
# stage only.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED=${SEED:-0} STEPS=${STEPS:-40} PAIRS=${PAIRS:-8} PRETRAIN_STEPS=${PRETRAIN_STEPS:-400} FAMILY=${FAMILY:-qwen2_vl}
TCOT=${TCOT:-full}
OWN=seed # OUT's default name
[[ -z "${TRAIN_FILES:-}" ]] || OWN=own
OUT=$(realpath -m "${OUT:-$ROOT/runs/tiny_cpu/$OWN$SEED}")
REWARD=${REWARD:-$ROOT/reward/no_judge.py}
case "$(basename "$REWARD")" in
    paper.py | public_code.py) JUDGE=${JUDGE:-1} ;;
    *) JUDGE=${JUDGE:-0} ;;
esac

FAMILIES=" qwen2_vl qwen2_5_vl qwen3_vl " STAGES=" world pretrain judge rl export evaluate "
[[ "$FAMILIES" == *" $FAMILY "* ]] || fail 2 "FAMILY must be one of$FAMILIES; got $FAMILY"
[[ -z "${UNTIL:-}" || "$STAGES" == *" $UNTIL "* ]] || fail 2 "UNTIL must be a stage ($STAGES); got $UNTIL"
[[ " full no_evidence answer_only " == *" $TCOT "* ]] || fail 2 "TCOT must be full, no_evidence or answer_only; got $TCOT"
whole_numbers STEPS PAIRS PRETRAIN_STEPS
[[ "$SEED" =~ ^[0-9]+$ ]] || fail 2 "SEED must be a whole number from 0; got $SEED"
[[ "$REWARD" == pkg://* || -f "$REWARD" ]] || fail 2 "REWARD must name a file of a reward function; there is no $REWARD"
[[ -n "${TRAIN_FILES:-}" || -z "${VAL_FILES:-}${MEDIA_ROOT:-}" ]] ||
    fail 2 "VAL_FILES and MEDIA_ROOT are of your own pairs; set TRAIN_FILES too"
[[ -z "${TRAIN_FILES:-}" || -n "${VAL_FILES:-}" ]] ||
    fail 2 "TRAIN_FILES needs VAL_FILES, pairs that share no content with it: embedrl data split FILE --rl-from all --holdout 0.2 --out DIR"
# The first stages would take minutes before the RL stage could not be told of such a path.
for name in OUT REWARD TRAIN_FILES VAL_FILES MEDIA_ROOT; do
    [[ "${!name:-}" != *[\'\$]* ]] || fail 2 "$name must be a path without ' and \$; got ${!name}"
done
[[ "$OUT" != *[][*?]* ]] || fail 2 "OUT must be a path without [, ], * and ?, which vLLM reads as a pattern; got $OUT"
# What programs of recipes/tiny_digits are told of this run's pairs, and what the RL stage is.
OWN_PAIRS=() HELD_OUT=() FILES=()
TOGETHER=4 # near numbers stand together
if [[ -n "${TRAIN_FILES:-}" ]]; then
    IFS=, read -ra OWN_FILES <<<"$TRAIN_FILES"
    IFS=, read -ra HELD_OUT <<<"$VAL_FILES"
    for file in "${OWN_FILES[@]}" "${HELD_OUT[@]}"; do
        [[ -e "$file" ]] || fail 2 "TRAIN_FILES and VAL_FILES must name files that are there; there is no $file"
    done
    for file in "${OWN_FILES[@]}"; do OWN_PAIRS+=(--pairs "$(realpath "$file")"); done
    for i in "${!HELD_OUT[@]}"; do HELD_OUT[i]=$(realpath "${HELD_OUT[i]}"); done
    TOGETHER=1
    FILES=("data.train_files=$(hydra_list "$TRAIN_FILES")" "data.val_files=$(hydra_list "$VAL_FILES")")
else
    HELD_OUT=("$OUT/world/heldout.parquet")
    FILES=("data.train_files='$OUT/world/train.parquet'" "data.val_files='${HELD_OUT[0]}'")
fi
ROOT_OPTION=()
if [[ -n "${MEDIA_ROOT:-}" ]]; then
    [[ -d "$MEDIA_ROOT" ]] || fail 2 "MEDIA_ROOT must be a folder; there is none at $MEDIA_ROOT"
    ROOT_OPTION=(--media-root "$(realpath "$MEDIA_ROOT")")
    FILES+=("data.media_root='${ROOT_OPTION[1]}'")
fi

CHECKPOINTS="$OUT/rl/checkpoints"
if ! is_dry_run; then
    lock_out
    own_tmp
fi
set_up_cpu

OVERRIDES=(
    platform=cpu
    "${FILES[@]}"
    "data.train_batch_size=$((2 * PAIRS))"
    data.max_prompt_length=416
    data.max_response_length=96
    "data.seed=$SEED"
    "data.embedrl.family=$FAMILY"
    data.embedrl.prompt_style=compact
    "data.embedrl.pairs_together=$TOGETHER"
    data.embedrl.image_min_tokens=4
    data.embedrl.image_max_tokens=64
    data.embedrl.frame_min_tokens=4
    data.embedrl.frame_max_tokens=16
    "actor_rollout_ref.model.path='$OUT/sft'"
    "actor_rollout_ref.actor.ppo_mini_batch_size=$PAIRS"
    actor_rollout_ref.actor.optim.lr=5e-5
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.max_model_len=512
    "embedrl.embedder.path='$OUT/embedder'"
    embedrl.embedder.image_min_tokens=4
    embedrl.embedder.image_max_tokens=64
    embedrl.embedder.frame_min_tokens=4
    embedrl.embedder.frame_max_tokens=16
    "reward.custom_reward_function.path='$REWARD'"
    "trainer.total_training_steps=$STEPS"
    trainer.total_epochs=1000
    trainer.test_freq=20 # after the checkpoint of the same step, whose model card gets the scores
    trainer.save_freq=20
    trainer.max_actor_ckpt_to_keep=2
    "trainer.default_local_dir='$CHECKPOINTS'"
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

TCOT_OPTION=()
if [[ "$TCOT" != full ]]; then
    TCOT_OPTION=(--tcot "$TCOT")
    OVERRIDES+=(embedrl.evidence.max_items=0)
fi

if is_dry_run; then
    train "${OVERRIDES[@]}" "$@"
    exit
fi

RESULTS=(
    results.json curves.png evaluation.json tcots.jsonl evaluation_cotrained.json tcots_cotrained.jsonl reasoner
    embedder_cotrained
)

# run_stage NAME COMMAND...: once for each command. What later stages made of an older result is void.
run_stage() {
    local name=$1 mark="$OUT/.stages/$1" started=$SECONDS stage
    STAGE=$1
    shift
    if [[ -f "$mark" && "$(cat "$mark")" == "$*" ]]; then
        say "$name: done before"
        return
    fi
    rm -f "$mark"
    for stage in ${STAGES#*" $name "}; do
        rm -f "$OUT/.stages/$stage"
    done
    say "$name"
    say_it_goes_on "$name" &
    TICKER=$!
    AT_EXIT+=(end_ticker)
    "$@"
    end_ticker
    printf '%s' "$*" >"$mark"
    say "$name took $((SECONDS - started)) s"
}

# A line every 20 s, until this script or TICKER ends, unless the training says so itself. No sleep: that would outlive both.
say_it_goes_on() {
    local seconds=0 pipe
    trap - EXIT INT
    exec {OUT_LOCK}>&- {pipe}<> <(:)
    while read -rt 20 -u "$pipe" || kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 20))
        [[ -f "$OUT/metrics.stage" ]] || say "$1: $seconds s"
    done
}
end_ticker() {
    kill "$TICKER" 2>/dev/null || true
    wait "$TICKER" 2>/dev/null || true
    unset 'AT_EXIT[-1]'
}

# The end, if UNTIL names this stage.
until_stage() { [[ "${UNTIL:-}" != "$1" ]] || exit 0; }

# same_stage NAME COMMAND...: what the stage made in OUT was made with other settings, and others were made of it.
same_stage() {
    local mark="$OUT/.stages/$1"
    [[ ! -f "$mark" || "$(cat "$mark")" == "${*:2}" ]] || fail 2 "OUT=$OUT holds a run whose stage $1 is" \
        "'$(cat "$mark")', and now it would be '${*:2}' (SEED, FAMILY, TCOT); choose another OUT"
}

make_world() {
    tiny models "$OUT/models/reasoner" --family "$1" --seed "$2"
    tiny models "$OUT/models/embedder" --family "$1" --seed "$(($2 + 1000))"
    tiny world "$OUT/world" --family "$1" --seed "$2"
}

# Both at once, on one core each. They end with this script, whatever ends it.
pretrain() {
    local options=(--seed "$1" --steps "$2" "${@:3}")
    "$PYTHON" -m recipes.tiny_digits.cold_start "$OUT/models/reasoner" "$OUT/world" "$OUT/sft" "${options[@]}" &
    REASONER_PID=$!
    "$PYTHON" -m recipes.tiny_digits.contrastive "$OUT/models/embedder" "$OUT/world" "$OUT/embedder" "${options[@]}" &
    EMBEDDER_PID=$!
    AT_EXIT+=(end_pretrain)
    wait "$REASONER_PID"
    wait "$EMBEDDER_PID"
    unset 'AT_EXIT[-1]'
}
end_pretrain() {
    kill "$REASONER_PID" "$EMBEDDER_PID" 2>/dev/null
    wait "$REASONER_PID" "$EMBEDDER_PID"
}

make_judge() { tiny judge "$OUT/world" "$OUT/judge" --seed "$1"; }

rl_settings() { printf '%s\n' "$@" | grep -v '^trainer.total_training_steps='; }

# An interrupted run goes on from its last checkpoint, and so does a longer one. Before anything of an earlier run is
# moved, the new one's configuration and reward function are checked.
prepare_rl() {
    local settings old="$OUT/rl" done=0 tracker="$CHECKPOINTS/latest_checkpointed_iteration.txt"
    settings=$(rl_settings "$@")
    if [[ -f "$OUT/.stages/rl" && "$(cat "$OUT/.stages/rl")" == "run_rl $*" ]]; then
        return
    fi
    [[ ! -f "$tracker" ]] || done=$(cat "$tracker")
    if [[ -d "$old" && ("$(cat "$old/settings" 2>/dev/null)" != "$settings" || "$done" -gt "$STEPS") ]]; then
        "$PYTHON" -m embedrl_verl.plan "$@" >/dev/null
        ((done <= STEPS)) || say "rl: before $done steps, now STEPS=$STEPS"
        rm -f "$OUT"/.stages/{rl,export,evaluate}
        diff <(cat "$old/settings" 2>/dev/null) <(echo "$settings") | sed -n 's/^</[recipe] rl: before /p;s/^>/[recipe] rl: now    /p' || true
        (
            cd "$OUT" && shopt -s nullglob && metrics=(metrics.jsonl*)
            set_aside rl "${metrics[@]}" "${RESULTS[@]}"
        )
    else
        set_aside "${RESULTS[@]}" # of fewer steps
    fi
}

run_rl() {
    mkdir -p "$OUT/rl"
    rl_settings "$@" >"$OUT/rl/settings"
    train "$@"
}

# The final weights as Hugging Face folders; a co-trained Embedder too.
export_models() {
    local step
    step="$CHECKPOINTS/global_step_$(cat "$CHECKPOINTS/latest_checkpointed_iteration.txt")"
    "$PYTHON" -m embedrl_verl.cli export "$step" --kind reasoner --out "$OUT/reasoner" --force
    [[ ! -d "$step/embedder" ]] ||
        "$PYTHON" -m embedrl_verl.cli export "$step" --kind embedder --out "$OUT/embedder_cotrained" --force
}

# By the Embedder that RL began with; a co-trained one beside it.
evaluate() {
    evaluate_by embedder ""
    [[ ! -d "$OUT/embedder_cotrained" ]] || evaluate_by embedder_cotrained _cotrained
}

evaluate_by() {
    tiny evaluate "$OUT/$1" "$OUT" "$OUT/sft" "$OUT/reasoner" "${HELD_OUT[@]}" --seed "$SEED" --suffix "$2" \
        "${ROOT_OPTION[@]}" "${TCOT_OPTION[@]}"
}

mkdir -p "$OUT/.stages"
same_stage world make_world "$FAMILY" "$SEED"
PRETRAIN=(pretrain "$SEED" "$PRETRAIN_STEPS" "${TCOT_OPTION[@]}" "${OWN_PAIRS[@]}")
((${#OWN_PAIRS[@]} == 0)) || PRETRAIN+=("${ROOT_OPTION[@]}")
same_stage pretrain "${PRETRAIN[@]}"
((JUDGE == 0)) || same_stage judge make_judge "$SEED"
start_fork_server
run_stage world make_world "$FAMILY" "$SEED"
until_stage world
run_stage pretrain "${PRETRAIN[@]}"
until_stage pretrain
((JUDGE == 0)) || run_stage judge make_judge "$SEED"
until_stage judge
prepare_rl "${OVERRIDES[@]}" "$@"
run_stage rl run_rl "${OVERRIDES[@]}" "$@"
until_stage rl
run_stage export export_models
until_stage export
run_stage evaluate evaluate
until_stage evaluate
tiny summary "$OUT"
