# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the GPU recipes of EG-RL share, from top to bottom: knobs and their checks, the Ray cluster, and in OVERRIDES the
# settings of all of them (the paper's; docs/configuration.md names their hydra keys). Sourced behind common.sh by a
# recipe that has set FAMILY and MODEL_PATH; it adds its engine's settings and ends with run_egrl "$@".

NNODES=${NNODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
EMBEDDER_PATH=${EMBEDDER_PATH:-Qwen/Qwen3-VL-Embedding-2B}
# A checkpoint without <emb> does not tell how it is prompted, so the profile of the known ones is named.
[[ "$EMBEDDER_PATH" != Qwen/Qwen3-VL-Embedding-* ]] || EMBEDDER_PROFILE=${EMBEDDER_PROFILE:-qwen3_vl_embedding}
EMBEDDER_PROFILE=${EMBEDDER_PROFILE:-auto}
TRAIN_FILES=${TRAIN_FILES:-data/train.parquet} VAL_FILES=${VAL_FILES:-data/val.parquet} MEDIA_ROOT=${MEDIA_ROOT:-}
# A judge for the process reward: a model that verl serves, or servers that run already.
JUDGE_PATH=${JUDGE_PATH:-} JUDGE_URLS=${JUDGE_URLS:-} JUDGE_GPUS_PER_NODE=${JUDGE_GPUS_PER_NODE:-0} JUDGE_TP=${JUDGE_TP:-1}
if [[ -z "$JUDGE_PATH$JUDGE_URLS" ]]; then
    REWARD=${REWARD:-$ROOT/reward/no_judge.py}
else
    REWARD=${REWARD:-$ROOT/reward/paper.py}
fi
OUT=${OUT:-$PWD/runs/$(basename "$0" .sh)} LOGGER=${LOGGER-console}
PAIRS=${PAIRS:-32} G=${G:-8} LR=${LR:-3e-6} KL=${KL:-0.01} CLIP=${CLIP:-0.2} TEMPERATURE=${TEMPERATURE:-1.0}
ROLLOUT_TP=${ROLLOUT_TP:-1} ATTENTION=${ATTENTION:-torch_varlen} STEPS=${STEPS:-}
MODE=${MODE:-sync} ROLLOUT_NNODES=${ROLLOUT_NNODES:-1} ROLLOUT_GPUS_PER_NODE=${ROLLOUT_GPUS_PER_NODE:-$GPUS_PER_NODE}

whole_numbers NNODES GPUS_PER_NODE PAIRS G ROLLOUT_TP ROLLOUT_NNODES ROLLOUT_GPUS_PER_NODE JUDGE_TP ${STEPS:+STEPS}
[[ "$JUDGE_GPUS_PER_NODE" =~ ^[0-9]+$ ]] ||
    fail 2 "JUDGE_GPUS_PER_NODE must be a whole number from 0; got $JUDGE_GPUS_PER_NODE"
numbers LR KL CLIP TEMPERATURE
case "$ATTENTION" in
    torch_varlen | flash_attention_2 | sdpa) ;;
    *) fail 2 "ATTENTION must be torch_varlen, flash_attention_2 or sdpa; got $ATTENTION" ;;
esac
case "$MODE" in
    sync | colocate_async) ;;
    separate_async)
        # Training GPUs hold the Embedder and the copy for the rollout too: the actor rests on the CPU between uses.
        OFFLOAD=${OFFLOAD:-True}
        if ((NNODES + ROLLOUT_NNODES > 2)) && [[ -z "${RAY_ADDRESS:-}" ]] && ! is_dry_run; then
            fail 2 "MODE=separate_async on several nodes needs a Ray cluster that has the GPUs of training" \
                "(NNODES x GPUS_PER_NODE) and of rollouts (ROLLOUT_NNODES x ROLLOUT_GPUS_PER_NODE): set RAY_ADDRESS"
        fi
        ;;
    *) fail 2 "MODE must be sync, colocate_async or separate_async; got $MODE" ;;
esac
OFFLOAD=${OFFLOAD:-False} # of the actor's weights and optimizer
case "$OFFLOAD" in
    True | False) ;;
    *) fail 2 "OFFLOAD must be True or False; got $OFFLOAD" ;;
esac

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

# Only this head: ray stop would end every Ray on the node.
stop_head() {
    kill "$HEAD" 2>/dev/null
    wait "$HEAD" 2>/dev/null
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
    HEAD=$!
    AT_EXIT+=(stop_head)
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

require_gpus
choose_python
is_dry_run || own_tmp
start_or_join_ray

OVERRIDES=(
    platform=gpu
    "data.embedrl.family=$FAMILY"
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
    trainer.save_freq=50
    trainer.max_actor_ckpt_to_keep=2
    trainer.test_freq=25
)
[[ -z "$MEDIA_ROOT" ]] || OVERRIDES+=("data.media_root='$MEDIA_ROOT'")
[[ -z "$STEPS" ]] || OVERRIDES+=("trainer.total_training_steps=$STEPS" trainer.total_epochs=1000000) # STEPS alone says how long
[[ -z "$JUDGE_URLS" ]] || OVERRIDES+=("embedrl.judge.urls=$(hydra_list "$JUDGE_URLS")")
# verl's own servers for the judge: by turns with the actor on its devices, or on JUDGE_GPUS_PER_NODE more a node.
[[ -z "$JUDGE_PATH" ]] || OVERRIDES+=(
    reward.reward_model.enable=True
    "reward.reward_model.model_path='$JUDGE_PATH'"
    "reward.reward_model.rollout.tensor_model_parallel_size=$JUDGE_TP"
)
[[ -z "$JUDGE_PATH" ]] || ((JUDGE_GPUS_PER_NODE == 0)) || OVERRIDES+=(
    reward.reward_model.enable_resource_pool=True
    "reward.reward_model.nnodes=$NNODES"
    "reward.reward_model.n_gpus_per_node=$JUDGE_GPUS_PER_NODE"
)
[[ "$MODE" == sync ]] || OVERRIDES+=("trainer.v1.trainer_mode=egrl_$MODE")
# Rollouts on GPUs of their own, which get new weights after each step's two updates (of PAIRS prompts each).
[[ "$MODE" != separate_async ]] || OVERRIDES+=(
    actor_rollout_ref.hybrid_engine=False
    "actor_rollout_ref.rollout.nnodes=$ROLLOUT_NNODES"
    "actor_rollout_ref.rollout.n_gpus_per_node=$ROLLOUT_GPUS_PER_NODE"
    actor_rollout_ref.rollout.checkpoint_engine.backend=nccl
    trainer.v1.separate_async.parameter_sync_step=2
)

# A run that has no checkpoint to go on from, or is told not to, does not mix its files with an earlier one's.
# Arguments as for `train`: they are checked before anything is moved.
keep_earlier_run() {
    local left=() run=()
    is_dry_run && return
    lock_out
    mapfile -t left < <(cd "$OUT" && find . -maxdepth 1 \( -name checkpoints -o -name rollouts -o -name validation \
        -o -name 'metrics.jsonl*' \) -printf '%P\n')
    ((${#left[@]})) || return 0
    # What is wrong with the arguments is said below.
    mapfile -t run < <("$PYTHON" - "$@" 2>/dev/null <<'PY'
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

# The plan or the training with OVERRIDES; further overrides of the command line win.
run_egrl() {
    OVERRIDES+=("$@")
    keep_earlier_run "${OVERRIDES[@]}"
    train "${OVERRIDES[@]}"
}
