# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the recipes share. Sourced, not run. Every knob is an environment variable; hydra overrides of the command line
# come last, so they win over everything a recipe sets.
set -euo pipefail

# With it every one of a run's processes would compile torch, vLLM and verl again.
unset PYTHONDONTWRITEBYTECODE

RECIPES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$RECIPES")

say() { echo "[recipe] $*"; }
# fail CODE MESSAGE...: 2 usage or configuration, 4 something is missing on this machine (as the package's own errors).
fail() {
    echo "[recipe] ${*:2}" >&2
    exit "$1"
}
# -h and --help print the recipe's own header, and nothing is started.
for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '3,${/^#/!q;s/^# \{0,1\}//;p}' "$0"
        exit 0
    fi
done

# One run at a time in OUT: two would write into each other's files. Held until this process and its stages have ended.
lock_out() {
    mkdir -p -- "$OUT"
    OUT=$(cd -- "$OUT" && pwd)
    exec {OUT_LOCK}>"$OUT/.lock"
    local code=0
    flock -n "$OUT_LOCK" || code=$?
    case "$code" in
        0) ;;
        1) fail 4 "OUT=$OUT is in use by another run (or by a process that one has left); wait for it, or choose another OUT" ;;
        *) say "OUT=$OUT cannot be locked (flock: $code): start no other run there" ;;
    esac
}

# set_aside NAME...: moves those that are there in OUT to a folder of their own in it, so that a new run stands alone and
# nothing is lost.
set_aside() {
    local name folder="" number=1
    for name in "$@"; do
        [[ -e "$OUT/$name" ]] || continue
        if [[ -z "$folder" ]]; then
            while [[ -e "$OUT/old-$number" ]]; do number=$((number + 1)); done
            folder="$OUT/old-$number"
            mkdir "$folder"
        fi
        mv "$OUT/$name" "$folder/"
    done
    [[ -z "$folder" ]] || say "what an earlier run left in OUT is now in $folder"
}

is_dry_run() { [[ -n "${DRY_RUN:-}" && "$DRY_RUN" != 0 ]]; }

has_verl() {
    command -v "$1" >/dev/null && "$1" - >/dev/null 2>&1 <<'PY'
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("verl", "embedrl_verl")))
PY
}

# Sets PYTHON: the one given, the active environment's, or .venv, which a dry run makes if need be.
choose_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        return
    fi
    if has_verl python3; then
        PYTHON=python3
        return
    fi
    if ! has_verl "$ROOT/.venv/bin/python"; then
        is_dry_run || fail 4 "this Python has no verl and embedrl_verl. Install them (README.md, On GPUs), or name an" \
            "environment that has them: PYTHON=/path/to/python bash ${0##*/}"
        bash "$ROOT/scripts/setup_env.sh"
    fi
    PYTHON="$ROOT/.venv/bin/python"
}

# Lets the stages of a CPU recipe be forked from one interpreter that has their imports, until this script ends.
start_fork_server() {
    local python from
    exec {from}< <(
        [[ -z "${OUT_LOCK:-}" ]] || exec {OUT_LOCK}>&- # it ends a moment after this script; its stages have the lock
        exec "$PYTHON" -m embedrl_verl.platforms.forkserver $$ matplotlib.pyplot peft sklearn.datasets
    )
    read -r python <&"$from" || true
    exec {from}<&-
    [[ -z "$python" ]] || export EMBEDRL_FORK_PYTHON=$python PYTHON=$python
}

count_gpus() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | wc -l
    fi
}

# Without a GPU there is nothing to run here, unless this machine only drives a cluster (RAY_ADDRESS).
require_gpus() {
    local present
    if is_dry_run || [[ -n "${RAY_ADDRESS:-}" ]]; then
        return
    fi
    present=$(count_gpus)
    if ((present == 0)); then
        fail 4 "${0##*/} needs NVIDIA GPUs and this machine has none. Without a GPU run:" \
            "bash recipes/run_egrl_tiny_cpu.sh (the same code with tiny models)," \
            "or look at this recipe's plan: DRY_RUN=1 bash recipes/${0##*/}"
    fi
    if ((present < GPUS_PER_NODE)); then
        fail 4 "GPUS_PER_NODE=$GPUS_PER_NODE, but this machine has $present GPU(s); set GPUS_PER_NODE=$present"
    fi
    local names=GPUS_PER_NODE numbers=$GPUS_PER_NODE wanted=$GPUS_PER_NODE
    if [[ "$MODE" == separate_async ]]; then
        names+=" + ROLLOUT_GPUS_PER_NODE" numbers+=" + $ROLLOUT_GPUS_PER_NODE" wanted=$((wanted + ROLLOUT_GPUS_PER_NODE))
    fi
    if ((${JUDGE_GPUS_PER_NODE:-0} > 0)); then
        names+=" + JUDGE_GPUS_PER_NODE" numbers+=" + $JUDGE_GPUS_PER_NODE" wanted=$((wanted + JUDGE_GPUS_PER_NODE))
    fi
    if ((present < wanted)); then
        fail 4 "$names = $numbers = $wanted, but this machine has $present GPU(s); lower one of them, or drive a cluster" \
            "(RAY_ADDRESS)"
    fi
}

# join_ray ADDRESS RAY...: work in that cluster until its head stops. A failure to join keeps Ray's message and exit code.
join_ray() {
    local address=$1 output code=0
    shift
    output=$(mktemp)
    "$@" start --address="$address" --block 2>&1 | tee "$output" || code=$?
    if grep -q 'Ray runtime started' "$output"; then
        rm -f "$output"
        say "Ray has ended on this node (exit code $code): the head has stopped, if nothing above says otherwise"
        return
    fi
    rm -f "$output"
    fail "$((code ? code : 4))" "this node has not joined $address: see what ray start says above"
}

# One node: verl starts Ray. Several: join the cluster of RAY_ADDRESS, or make one from NODE_RANK and MASTER_ADDR,
# with this recipe started on every node; only rank 0 goes on from here.
start_or_join_ray() {
    if [[ -n "${RAY_ADDRESS:-}" ]] || ((NNODES == 1)); then
        return
    fi
    if is_dry_run; then
        [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] || say "NNODES=$NNODES: the run needs RAY_ADDRESS, or" \
            "NODE_RANK and MASTER_ADDR on every node (docs/gpu.md)"
        return
    fi
    local port=${MASTER_PORT:-6379}
    if [[ -z "${NODE_RANK:-}" || -z "${MASTER_ADDR:-}" ]]; then
        fail 2 "NNODES=$NNODES needs a Ray cluster: either start one (ray start --head on the first node," \
            "ray start --address=HEAD:$port on the others) and set RAY_ADDRESS=HEAD:$port here, or run this recipe on" \
            "every node with NODE_RANK=0..$((NNODES - 1)) and MASTER_ADDR=the first node's address"
    fi
    # Recent Ray asks for a token, and every node must have the same one.
    [[ -z "${RAY_AUTH_TOKEN:-}" ]] || export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    [[ -n "${RAY_AUTH_MODE:-}" ]] || fail 2 "set RAY_AUTH_TOKEN to the same secret on every node (or" \
        "RAY_AUTH_MODE=disabled in a network that you trust)"
    local ray=("$PYTHON" -m ray.scripts.scripts)
    if ((NODE_RANK > 0)); then
        say "node $NODE_RANK joins $MASTER_ADDR:$port and works until the head stops"
        join_ray "$MASTER_ADDR:$port" "${ray[@]}"
        exit 0
    fi
    say "starting the Ray head on $MASTER_ADDR:$port"
    "${ray[@]}" start --head --node-ip-address="$MASTER_ADDR" --port="$port" \
        --disable-usage-stats --block &
    # Only this head is stopped at the end: ray stop would end every Ray on the node.
    trap "kill $! 2>/dev/null || true; wait $! 2>/dev/null || true" EXIT
    export RAY_ADDRESS="$MASTER_ADDR:$port"
    "$PYTHON" - "$NNODES" "${RAY_WAIT_SECONDS:-600}" <<'PY'
import sys, time
import ray

wanted, patience_s = int(sys.argv[1]), float(sys.argv[2])
start, alive = time.monotonic(), 0
while alive < wanted:
    if time.monotonic() - start > patience_s:
        raise SystemExit(f"[recipe] {alive} of {wanted} nodes joined within {patience_s:.0f} s (RAY_WAIT_SECONDS)")
    time.sleep(2)
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError:
        continue  # the head is still starting
    alive = sum(node["Alive"] for node in ray.nodes())
print(f"[recipe] all {wanted} nodes are in")
PY
}

# "a.parquet,b.parquet" as a hydra list whose elements may hold any character but a quote.
hydra_list() {
    local IFS=, item out=
    for item in $1; do
        out+="${out:+,}'$item'"
    done
    echo "[$out]"
}

# Knobs of the GPU recipes; the settings of the paper (docs/configuration.md names their hydra keys).
gpu_knobs() {
    NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
    # A checkpoint without <emb> does not tell how it is prompted, so its profile is named.
    [[ -n "${EMBEDDER_PATH:-}" ]] || EMBEDDER_PROFILE=${EMBEDDER_PROFILE:-qwen3_vl_embedding}
    EMBEDDER_PATH=${EMBEDDER_PATH:-Qwen/Qwen3-VL-Embedding-2B} EMBEDDER_PROFILE=${EMBEDDER_PROFILE:-auto}
    TRAIN_FILES=${TRAIN_FILES:-data/train.parquet} VAL_FILES=${VAL_FILES:-data/val.parquet} MEDIA_ROOT=${MEDIA_ROOT:-}
    # A judge for the process reward: a model that verl serves, or servers that run already.
    JUDGE_PATH=${JUDGE_PATH:-} JUDGE_URLS=${JUDGE_URLS:-} JUDGE_GPUS_PER_NODE=${JUDGE_GPUS_PER_NODE:-0}
    local preset=no_judge
    [[ -z "$JUDGE_PATH$JUDGE_URLS" ]] || preset=paper
    REWARD=${REWARD:-$ROOT/reward/$preset.py}
    OUT=${OUT:-$PWD/runs/$(basename "$0" .sh)}
    PAIRS=${PAIRS:-32} G=${G:-8} LR=${LR:-3e-6} KL=${KL:-0.01} CLIP=${CLIP:-0.2} TEMPERATURE=${TEMPERATURE:-1.0}
    ROLLOUT_TP=${ROLLOUT_TP:-1} ATTENTION=${ATTENTION:-torch_varlen}
    MODE=${MODE:-sync} ROLLOUT_NNODES=${ROLLOUT_NNODES:-1} ROLLOUT_GPUS_PER_NODE=${ROLLOUT_GPUS_PER_NODE:-$GPUS_PER_NODE}
    local name
    for name in NNODES GPUS_PER_NODE PAIRS G ROLLOUT_TP ROLLOUT_NNODES ROLLOUT_GPUS_PER_NODE; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail 2 "$name must be a whole number from 1; got ${!name}"
    done
    for name in LR KL CLIP TEMPERATURE; do
        [[ "${!name}" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || fail 2 "$name must be a number; got ${!name}"
    done
    case "$ATTENTION" in
        torch_varlen | flash_attention_2 | sdpa) ;;
        *) fail 2 "ATTENTION must be torch_varlen, flash_attention_2 or sdpa; got $ATTENTION" ;;
    esac
    case "${OFFLOAD:-True}" in
        True | False) ;;
        *) fail 2 "OFFLOAD must be True or False; got $OFFLOAD" ;;
    esac
    case "$MODE" in
        sync | colocate_async) ;;
        separate_async)
            if ((NNODES + ROLLOUT_NNODES > 2)) && [[ -z "${RAY_ADDRESS:-}" ]] && ! is_dry_run; then
                fail 2 "MODE=separate_async on several nodes needs a Ray cluster that has the GPUs of training" \
                    "(NNODES x GPUS_PER_NODE) and of rollouts (ROLLOUT_NNODES x ROLLOUT_GPUS_PER_NODE): set RAY_ADDRESS"
            fi
            ;;
        *) fail 2 "MODE must be sync, colocate_async or separate_async; got $MODE" ;;
    esac
}

# The overrides of every GPU recipe, in OVERRIDES. The family comes first: gpu_overrides qwen2_vl
gpu_overrides() {
    OVERRIDES=(
        platform=gpu
        "data.embedrl.family=$1"
        "data.train_files=$(hydra_list "$TRAIN_FILES")"
        "data.val_files=$(hydra_list "$VAL_FILES")"
        "data.train_batch_size=$((2 * PAIRS))"
        data.max_prompt_length=14336
        data.max_response_length=2048
        "actor_rollout_ref.model.path='$MODEL_PATH'"
        "actor_rollout_ref.actor.ppo_mini_batch_size=$PAIRS"
        "actor_rollout_ref.actor.optim.lr=$LR"
        "actor_rollout_ref.actor.clip_ratio=$CLIP"
        actor_rollout_ref.actor.use_kl_loss=True
        "actor_rollout_ref.actor.kl_loss_coef=$KL"
        actor_rollout_ref.actor.kl_loss_type=low_var_kl
        "actor_rollout_ref.rollout.n=$G"
        "actor_rollout_ref.rollout.temperature=$TEMPERATURE"
        "actor_rollout_ref.rollout.tensor_model_parallel_size=$ROLLOUT_TP"
        "embedrl.embedder.path='$EMBEDDER_PATH'"
        "embedrl.embedder.profile=$EMBEDDER_PROFILE"
        "reward.custom_reward_function.path='$REWARD'"
        "trainer.nnodes=$NNODES"
        "trainer.n_gpus_per_node=$GPUS_PER_NODE"
        "attention=$ATTENTION"
        "trainer.experiment_name=$(basename "$0" .sh)"
        "trainer.default_local_dir='$OUT/checkpoints'"
        "trainer.rollout_data_dir='$OUT/rollouts'"
        "trainer.validation_data_dir='$OUT/validation'"
        trainer.logger=[console,file]
        trainer.save_freq=50
        trainer.max_actor_ckpt_to_keep=2
        trainer.test_freq=25
    )
    [[ -z "$MEDIA_ROOT" ]] || OVERRIDES+=("data.media_root='$MEDIA_ROOT'")
    [[ -z "$JUDGE_URLS" ]] || OVERRIDES+=("embedrl.judge.urls=$(hydra_list "$JUDGE_URLS")")
    [[ -z "$JUDGE_PATH" ]] || judge_overrides
    [[ "$MODE" == sync ]] || OVERRIDES+=("trainer.v1.trainer_mode=egrl_$MODE")
    [[ "$MODE" != separate_async ]] || separate_overrides
}

# Rollouts on GPUs of their own, which get new weights after each step's two updates (of PAIRS prompts each).
separate_overrides() {
    OVERRIDES+=(
        actor_rollout_ref.hybrid_engine=False
        "actor_rollout_ref.rollout.nnodes=$ROLLOUT_NNODES"
        "actor_rollout_ref.rollout.n_gpus_per_node=$ROLLOUT_GPUS_PER_NODE"
        actor_rollout_ref.rollout.checkpoint_engine.backend=nccl
        trainer.v1.separate_async.parameter_sync_step=2
    )
}

# verl's own servers for the judge: by turns with the actor on its devices, or on JUDGE_GPUS_PER_NODE more a node.
judge_overrides() {
    OVERRIDES+=(
        reward.reward_model.enable=True
        "reward.reward_model.model_path='$JUDGE_PATH'"
        "reward.reward_model.rollout.tensor_model_parallel_size=${JUDGE_TP:-1}"
    )
    ((JUDGE_GPUS_PER_NODE == 0)) || OVERRIDES+=(
        reward.reward_model.enable_resource_pool=True
        "reward.reward_model.nnodes=$NNODES"
        "reward.reward_model.n_gpus_per_node=$JUDGE_GPUS_PER_NODE"
    )
}

# Weights and optimizer of the actor rest on the CPU between uses where the GPUs are full without: beside Megatron's
# unsharded gradients, and in separate_async, whose training GPUs hold the Embedder and the copy for the rollout too.
choose_offload() {
    local default=False
    [[ "$1" != megatron && "$MODE" != separate_async ]] || default=True
    OFFLOAD=${OFFLOAD:-$default}
}

# FSDP2 actor; the reference model rests on the CPU between uses.
fsdp_overrides() {
    OVERRIDES+=(
        actor_rollout_ref.actor.strategy=fsdp2
        actor_rollout_ref.ref.strategy=fsdp2
        actor_rollout_ref.ref.fsdp_config.param_offload=True
        "actor_rollout_ref.actor.fsdp_config.param_offload=$OFFLOAD"
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=$OFFLOAD"
    )
}

# Megatron actor by verl's own engine switch. The Embedder stays on FSDP2: it is another process.
megatron_overrides() {
    local split=1 tp pp role
    ((NNODES * GPUS_PER_NODE < 4)) || split=2
    tp=${ACTOR_TP:-$split} pp=${ACTOR_PP:-$split}
    OVERRIDES+=(
        model_engine=megatron
        # The FSDP keys of egrl_trainer.yaml, in Megatron's terms.
        actor_rollout_ref.actor.strategy=megatron
        actor_rollout_ref.ref.strategy=megatron
        '~actor_rollout_ref.actor.grad_clip'
        actor_rollout_ref.actor.optim.clip_grad=1.0
    )
    for role in actor ref; do
        OVERRIDES+=(
            "actor_rollout_ref.$role.megatron.tensor_model_parallel_size=$tp"
            "actor_rollout_ref.$role.megatron.pipeline_model_parallel_size=$pp"
        )
    done
    OVERRIDES+=(
        # Else a micro-batch of 32k tokens keeps 36 GB of activations (TP 2, PP 2), and two are in flight.
        actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
        actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform
        actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1
        actor_rollout_ref.model.use_fused_kernels=False # Megatron's own, which verl has with another back end
        "actor_rollout_ref.actor.megatron.param_offload=$OFFLOAD"
        "actor_rollout_ref.actor.megatron.optimizer_offload=$OFFLOAD"
        actor_rollout_ref.ref.megatron.param_offload=True)
}

# The plan in a dry run, else the training; arguments are hydra overrides.
train() {
    if is_dry_run; then
        "$PYTHON" -m embedrl_verl.plan "$@"
    else
        export VERL_FILE_LOGGER_PATH="$OUT/metrics.jsonl"
        [[ -n "${OUT_LOCK:-}" ]] || lock_out
        "$PYTHON" -m embedrl_verl.train "$@"
    fi
}

# A run that has no checkpoint to go on from, or is told not to, does not mix its files with an earlier one's.
# Arguments as for `train`: they are checked before anything is moved.
keep_earlier_run() {
    local left=() run=()
    is_dry_run && return
    lock_out
    mapfile -t left < <(cd "$OUT" && find . -maxdepth 1 \( -name checkpoints -o -name rollouts -o -name validation \
        -o -name 'metrics.jsonl*' \) -printf '%P\n')
    ((${#left[@]})) || return 0
    mapfile -t run < <("$PYTHON" - "$@" <<'PY'
import sys
from embedrl_verl.config.compose import compose
trainer = compose(sys.argv[1:]).trainer
print(trainer.resume_mode, trainer.default_local_dir, sep="\n")
PY
    )
    if [[ "${run[0]:-}" == resume_path ]] ||
        [[ "${run[0]:-}" != disable && -f "${run[1]:-}/latest_checkpointed_iteration.txt" ]]; then
        return
    fi
    "$PYTHON" -m embedrl_verl.plan "$@" >/dev/null
    set_aside "${left[@]}"
}

# A whole GPU recipe: run_gpu_recipe FAMILY ENGINE "$@", with MODEL_PATH set.
run_gpu_recipe() {
    local family=$1 engine=$2
    shift 2
    gpu_knobs
    require_gpus
    choose_python
    start_or_join_ray
    choose_offload "$engine"
    gpu_overrides "$family"
    "${engine}_overrides"
    keep_earlier_run "${OVERRIDES[@]}" "$@"
    train "${OVERRIDES[@]}" "$@"
}
