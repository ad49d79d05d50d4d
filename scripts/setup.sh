# Sourced by the other scripts: makes .venv beside the project, once, with torch for this machine.
# PYTHON chooses the interpreter; safe to run any number of times.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quietly() {
    local log
    log=$(mktemp)
    "$@" >"$log" 2>&1 || { local code=$?; cat "$log" >&2; rm -f "$log"; return "$code"; }
    rm -f "$log"
}

if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON") if sys.version_info < (3, 10) else None'
    "${PYTHON:-python3}" -m venv .venv
fi
extras=runtime,bench,dev,tensorrt-rtx
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }
if has_gpu; then extras=$extras,cuda; fi
stamp=.venv/installed-$(sha256sum pyproject.toml | cut -c1-16)-$extras
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (a few minutes the first time)" >&2
    quietly .venv/bin/python -m pip install --upgrade "setuptools>=77" wheel
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if has_gpu; then
            quietly .venv/bin/python -m pip install torch
        else
            # The CPU build: from PyTorch's own index if it can be reached, else by the version that has one elsewhere.
            .venv/bin/python -m pip install -q --timeout 10 --retries 0 torch==2.13.0 \
                --index-url https://download.pytorch.org/whl/cpu >/dev/null 2>&1 ||
                quietly .venv/bin/python -m pip install torch==2.13.0
        fi
    fi
    quietly .venv/bin/python -m pip install -e ".[$extras]"
    touch "$stamp"
fi
