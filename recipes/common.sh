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
# whole_numbers NAME..., numbers NAME...: refuse knobs with another value (whole: from 1).
whole_numbers() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail 2 "$name must be a whole number from 1; got ${!name}"
    done
}
numbers() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || fail 2 "$name must be a number of 0 or more; got ${!name}"
    done
}

# -h and --help print the recipe's own header, and nothing is started.
for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '3,${/^#/!q;s/^# \{0,1\}//;p}' "$0"
        exit 0
    fi
done

# How this script ends, whatever ends it: the commands of AT_EXIT, the last first, and after Ctrl-C one line.
AT_EXIT=() NESTED=${EMBEDRL_RECIPE:-} THE_COMMAND="bash $0${*:+ ${*@Q}}"
export EMBEDRL_RECIPE=1
finish() {
    local code=$? number doing="" last=""
    trap - EXIT
    trap '' INT TERM HUP
    set +e
    for ((number = ${#AT_EXIT[@]}; number-- > 0; )); do "${AT_EXIT[number]}"; done
    if ((code == 130)) && [[ -z "$NESTED" ]]; then
        if [[ "${STAGE:-rl}" == rl ]]; then
            doing=$(cat "${OUT:-}/metrics.stage" 2>/dev/null)
            last=$(cat "${CHECKPOINTS:-${OUT:-}/checkpoints}/latest_checkpointed_iteration.txt" 2>/dev/null)
        fi
        echo "[recipe] interrupted${STAGE:+ in stage $STAGE}${doing:+ ($doing)}${last:+, last checkpoint: step $last};" \
            "the same command goes on from there: $THE_COMMAND" >&2
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT

# Bars are for terminals: in a file they are one line of many screens.
[[ -t 2 ]] || export TQDM_DISABLE=1

# The run's own folder for temporary files, removed at the end: verl's locks, vLLM's sockets, Ray's session, whose logs are
# kept in OUT. Not in a cluster, whose nodes have Ray's folder already.
own_tmp() {
    local base=${TMPDIR:-/tmp}
    [[ -z "${RAY_ADDRESS:-}" ]] && ((${NNODES:-1} == 1)) || return 0
    ((${#base} <= 24)) || base=/tmp # a socket's path has at most 107 characters, and Ray adds 68
    : "${TORCHINDUCTOR_CACHE_DIR:=${TMPDIR:-/tmp}/torchinductor_$(id -un)}" # its place without us, for later runs too
    RUN_TMP=$(mktemp -d "$base/embedrl-XXXXXX")
    export TORCHINDUCTOR_CACHE_DIR TMPDIR=$RUN_TMP RAY_TMPDIR=$RUN_TMP
    AT_EXIT+=(remove_tmp)
}
remove_tmp() {
    local logs="$RUN_TMP/ray/session_latest/logs"
    [[ ! -d "$logs" ]] || { rm -rf -- "$OUT/ray_logs" && cp -r -- "$logs" "$OUT/ray_logs"; }
    # After a signal Ray is still ending, and writes.
    rm -rf -- "$RUN_TMP" 2>/dev/null || { sleep 2 && rm -rf -- "$RUN_TMP"; }
}

# One run at a time in OUT: two would write into each other's files. Held until this process and its stages have ended.
lock_out() {
    { mkdir -p -- "$OUT" && : >>"$OUT/.lock"; } 2>/dev/null ||
        fail 2 "OUT=$OUT cannot be written; choose a folder that can: OUT=/path/to/folder $THE_COMMAND"
    OUT=$(cd -- "$OUT" && pwd)
    exec {OUT_LOCK}>"$OUT/.lock"
    local code=0
    flock -n "$OUT_LOCK" || code=$?
    case "$code" in
        0) ;;
        1) fail 2 "OUT=$OUT is in use by another run (or by a process that one has left); wait for it, or choose another:" \
            "OUT=/path/to/folder $THE_COMMAND" ;;
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
        say "a plan needs verl, which this Python lacks: .venv is set up first (PYTHON names another environment)"
        bash "$ROOT/scripts/setup_env.sh"
    fi
    PYTHON="$ROOT/.venv/bin/python"
}

# What every recipe without a GPU begins with: the environment of the engines, the code of recipes/tiny_digits on the
# path, and PYTHON, for which a clone sets up .venv.
set_up_cpu() {
    export VERL_PLATFORM=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    export TORCH_COMPILE_DISABLE=1 # vLLM compiles two small functions of its sampler: 20 s a start
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    if [[ -z "${PYTHON:-}" && -f "$ROOT/scripts/setup_env.sh" ]]; then
        { : >>"$ROOT/.venv.lock"; } 2>/dev/null || has_verl "$ROOT/.venv/bin/python" ||
            fail 2 "$ROOT cannot be written, so there can be no .venv; name an environment that has verl and" \
                "embedrl_verl: PYTHON=/path/to/python $THE_COMMAND"
        bash "$ROOT/scripts/setup_env.sh"
        PYTHON="$ROOT/.venv/bin/python"
    fi
    choose_python
}

# tiny NAME ARGUMENTS...: a program of recipes/tiny_digits.
tiny() { "$PYTHON" -m "recipes.tiny_digits.$1" "${@:2}"; }

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
    if [[ "${MODE:-}" == separate_async ]]; then
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

# "a.parquet,b.parquet" as a hydra list whose elements may hold any character but a quote.
hydra_list() {
    local item items out=
    IFS=, read -ra items <<<"$1" # no glob: a name may have brackets
    for item in "${items[@]}"; do
        out+="${out:+,}'$item'"
    done
    echo "[$out]"
}

# The plan in a dry run, else the training; arguments are hydra overrides, which win over LOGGER.
train() {
    local logger="trainer.logger=[file${LOGGER:+,$LOGGER}]"
    if is_dry_run; then
        "$PYTHON" -m embedrl_verl.plan "$logger" "$@"
    else
        export VERL_FILE_LOGGER_PATH="$OUT/metrics.jsonl"
        export TENSORBOARD_DIR=${TENSORBOARD_DIR:-$OUT/tensorboard} WANDB_DIR=${WANDB_DIR:-$OUT}
        [[ -n "${OUT_LOCK:-}" ]] || lock_out
        rm -f "$OUT/metrics.stage" # of an interrupted run
        "$PYTHON" -m embedrl_verl.train "$logger" "$@"
    fi
}
