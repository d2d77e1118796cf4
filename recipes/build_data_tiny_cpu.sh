#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The data build on a machine without a GPU: 1,000 pairs of digits are annotated by a tiny Reasoner, judged by a tiny
# relevance judge (both served by stock vLLM) and split into the sets of the contrastive stage and of RL. Then all of it is
# done again, killed with kill -9 twice in the annotation and twice in the judgement, and compared byte by byte.
#
#   bash recipes/build_data_tiny_cpu.sh
#
# Sets up .venv first. REASONER=runs/tiny_cpu/seed0/sft and RELEVANCE_JUDGE=DIR reuse models; without them the cold start
# of recipes/run_egrl_tiny_cpu.sh is run, and the judge is trained. SEED=0, PAIRS=1000, LIMIT=64 (requests in flight),
# OUT=runs/build_data_tiny_cpu/seed0, KILLS=2 (0: no second run). Finished stages are not done again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED=${SEED:-0} PAIRS=${PAIRS:-1000} LIMIT=${LIMIT:-64} KILLS=${KILLS:-2}
OUT=${OUT:-$ROOT/runs/build_data_tiny_cpu/seed$SEED}
RELEVANCE_JUDGE=${RELEVANCE_JUDGE:-$OUT/relevance_judge}

lock_out
own_tmp
set_up_cpu

SERVER=
stop_server() {
    [[ -z "$SERVER" ]] || kill "$SERVER" 2>/dev/null || true
    [[ -z "$SERVER" ]] || wait "$SERVER" 2>/dev/null || true
    SERVER=
}
AT_EXIT+=(stop_server)

# serve FOLDER NAME: vLLM on a free port; sets URL.
serve() {
    local port waited=0
    stop_server
    port=$("$PYTHON" -c "from embedrl_verl.platforms.ports import free_port; print(free_port())")
    URL="http://127.0.0.1:$port"
    say "serving $1"
    "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$1" --served-model-name "$2" --dtype float32 \
        --worker-extension-cls embedrl_verl.platforms.vllm_seeds.SeedsOnCpus \
        --enforce-eager --max-model-len 512 --host 127.0.0.1 --port "$port" --disable-uvicorn-access-log \
        >"$OUT/$2.log" 2>&1 &
    SERVER=$!
    until "$PYTHON" -c "import urllib.request as u; u.urlopen('$URL/health', timeout=5)" 2>/dev/null; do
        kill -0 "$SERVER" 2>/dev/null || fail 4 "the server of $1 has ended; see $OUT/$2.log"
        ((waited++ < 900)) || fail 4 "the server of $1 does not answer; see $OUT/$2.log"
        sleep 1
    done
}

data() { "$PYTHON" -m embedrl_verl.cli data "$@"; }

annotate() {
    data annotate "$OUT/pairs.parquet" --out "$1" --url "$URL" --family qwen2_vl --style compact --no-few-shot \
        --image-min-tokens 4 --frame-min-tokens 4 --max-tokens 96 --limit "$LIMIT" --shard-rows 256 --seed "$SEED" \
        --max-failed-share 0.5
}

# From the first annotation in both runs: a folder's name is no part of what is compared, but its path is in the lists.
judge() {
    data filter "$OUT/annotated" --out "$1" --url "$URL" --style compact --limit "$LIMIT" --shard-rows 256 \
        --seed "$SEED" --rl-rows 50 --rl-from mismatch
}

answers() { cat "$1/_work/answers.jsonl" 2>/dev/null | wc -l; }

# killed COMMAND FOLDER WORK TOTAL LAST: run it and kill it with signal 9, KILLS times at even shares of TOTAL answers;
# then let it finish. LAST is the file that it writes last.
killed() {
    local kill job share
    if [[ -f "$2/$5" ]]; then
        say "$2 is finished"
        return
    fi
    for ((kill = 1; kill <= KILLS; kill++)); do
        share=$(($4 * kill / (KILLS + 1)))
        "$1" "$2" >"$OUT/killed.log" 2>&1 &
        job=$!
        while (($(answers "$3") < share)) && kill -0 "$job" 2>/dev/null; do sleep 0.1; done
        # The function runs in a subshell; the command is its child.
        pkill -KILL -P "$job" || true
        kill -KILL "$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
        [[ -d "$3/_work" ]] || fail 4 "$1 had finished before it could be killed"
        say "$1: killed with $(answers "$3") of about $4 answers on the disk"
    done
    "$1" "$2"
}

same() {
    diff -r "$1" "$2" >"$OUT/differences.txt" || fail 4 "$1 and $2 differ, see $OUT/differences.txt"
    say "$2 equals $1 byte by byte: $(find "$1" -type f | wc -l) files"
}

if [[ -z "${REASONER:-}" ]]; then
    SEED=$SEED OUT="$OUT/models" UNTIL=pretrain PYTHON="$PYTHON" bash "$RECIPES/run_egrl_tiny_cpu.sh"
    REASONER="$OUT/models/sft"
fi
[[ -f "$RELEVANCE_JUDGE/config.json" ]] || tiny relevance "$RELEVANCE_JUDGE" --seed "$SEED"

if [[ ! -f "$OUT/pairs.parquet" ]]; then
    tiny world "$OUT/world" --seed "$((SEED + 100))"
    "$PYTHON" - "$OUT" "$PAIRS" <<'PY'
import sys
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.writer import write_pairs

out, count = sys.argv[1], int(sys.argv[2])
pairs = list(read_pairs(f"{out}/world/train.parquet"))
write_pairs([pairs[i * len(pairs) // count] for i in range(count)], f"{out}/pairs.parquet")
PY
fi

serve "$REASONER" reasoner
annotate "$OUT/annotated"
((KILLS == 0)) || killed annotate "$OUT/annotated_killed" "$OUT/annotated_killed" "$((2 * PAIRS))" data_card.json
serve "$RELEVANCE_JUDGE" judge
judge "$OUT/filtered"
((KILLS == 0)) || killed judge "$OUT/filtered_killed" "$OUT/filtered_killed/verdicts" "$PAIRS" split.json
if ((KILLS > 0)); then
    same "$OUT/annotated" "$OUT/annotated_killed"
    same "$OUT/filtered" "$OUT/filtered_killed"
fi
say "contrastive set: $OUT/filtered/contrastive; RL set: $OUT/filtered/rl"
