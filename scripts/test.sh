#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the test suite; sets up .venv first when it is missing or out of date. Arguments go to pytest, as they are:
#
#   bash scripts/test.sh                     # everything, the end-to-end tests too
#   bash scripts/test.sh -m "not e2e"        # without those that start Ray and vLLM
#   bash scripts/test.sh -m nightly          # models that learn: minutes each, and the main job shows the same
#
# Without arguments the tests run in two parts: those that are not end to end on several processes (TEST_WORKERS=N; the
# default has a core and 3 GiB of free memory for each), then the end-to-end tests one after another.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE # compiled once, not in every process of the end-to-end tests
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTHON="$ROOT/.venv/bin/python"
"$ROOT/.venv/bin/ruff" check .
"$ROOT/.venv/bin/ruff" format --check .
"$ROOT/.venv/bin/mypy"
if (($# > 0)); then
    exec "$PYTHON" -m pytest "$@"
fi

workers() {
    local cores by_memory
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc heeds them
    by_memory=$(awk '/^MemAvailable:/ { print int($2 / (3 * 1024 * 1024)) }' /proc/meminfo)
    echo $((cores < by_memory ? cores : by_memory > 1 ? by_memory : 1))
}

code=0
# A file's tests stay together: many share what is made once for a file.
"$PYTHON" -m pytest -m "not e2e and not nightly" -n "${TEST_WORKERS:-$(workers)}" --dist loadfile --durations=10 || code=$?
"$PYTHON" -m pytest -m "e2e and not nightly" --durations=10 || code=$?
bash scripts/newest_verl.sh # tells what the newest verl has moved; never fails, its head says why
# Of their files only: to collect the whole tree once more takes 14 s.
echo "Left to 'bash scripts/test.sh -m nightly':"
"$PYTHON" -m pytest -m nightly --collect-only -q $(grep -rl --include="*.py" "mark.nightly" tests) || true
exit "$code"
