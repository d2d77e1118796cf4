#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What this project assumes of a GPU, measured on one in at most fifteen minutes: eight stages of at most 110 s, each
# with a line of verdict and a JSON of figures in OUT. Nothing is downloaded or installed; a stage that lacks a package
# says so. The first stage needs torch only, the next ones transformers, the last ones verl and vLLM.
#
#   bash scripts/gpu_check.sh                    # all stages, into benchmarks/results/gpu
#   bash scripts/gpu_check.sh attention width    # some
#   DEVICE=cpu OUT=/tmp/check bash scripts/gpu_check.sh    # the same code at small sizes, without a GPU
#
# PYTHON names the interpreter (the active environment's, else .venv's), GPU_CHECK_SITE a folder of packages that it lacks.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ ! -x "$ROOT/.venv/bin/python" ]] || python3 -c "import torch" 2>/dev/null || PYTHON="$ROOT/.venv/bin/python"
fi
export PYTHONPATH="$ROOT/benchmarks:$ROOT${GPU_CHECK_SITE:+:$GPU_CHECK_SITE}${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu_check --device "${DEVICE:-cuda}" --out "${OUT:-$ROOT/benchmarks/results/gpu}" "$@"
