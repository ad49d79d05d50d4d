# Sourced by the other scripts: makes .venv beside the project, once, with torch for this machine, and says what it does.
# PYTHON chooses the interpreter. Safe to run any number of times, also after a run that was interrupted.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "setup: $*" >&2; }

# Runs a command; says every 15 seconds that it goes on, and shows what it printed only where it failed.
quietly() {
    local log pid started=$SECONDS code=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; rm -f "$log"; trap - INT TERM; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - started >= 15 && (SECONDS - started) % 15 == 0)) && ((SECONDS != ${told:-0})); then
            told=$SECONDS
            say "  … $((SECONDS - started)) s: $(tail -n 1 "$log" | cut -c 1-100)"
        fi
    done
    wait "$pid" || code=$?
    trap - INT TERM
    if ((code)); then cat "$log" >&2; fi
    rm -f "$log"
    return "$code"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; }

extras=runtime,bench,dev,tensorrt-rtx,serve,grammar,tenancy
if has_gpu; then extras=$extras,cuda; fi
# What stands in pyproject.toml decides whether anything is to be done.
stamp=.venv/installed-$(sha256sum pyproject.toml | cut -c1-16)-$extras


# Whether .venv has a Python that starts, and what was installed is still there.
works() {
    .venv/bin/python -c 'import sys; from importlib.util import find_spec as there
sys.exit(not all(map(there, ("torch", "transformers", "trtllm_vattn"))))' 2>/dev/null
}

if [ ! -e "$stamp" ] || ! works; then
    # A first run that was interrupted leaves a .venv without python or without pip: both are made again.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=${PYTHON:-python3}
        command -v "$python" >/dev/null || { say "there is no $python; install Python 3.10 or newer, or set PYTHON"; exit 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { say "$("$python" --version 2>&1) is too old; install Python 3.10 or newer, or set PYTHON"; exit 1; }
        if [ -e .venv ] || [ -L .venv ]; then
            say ".venv is there and does not work (an interrupted set-up, or its Python is gone): it is made again"
            rm -rf .venv
        fi
        say "1 of 4: .venv, with $("$python" --version 2>&1)"
        quietly "$python" -m venv .venv ||
            { say "no .venv could be made; on Debian and Ubuntu: apt install python3-venv"; rm -rf .venv; exit 1; }
    else
        say "1 of 4: .venv is there"
    fi
    say "2 of 4: setuptools and wheel (2 MB)"
    quietly .venv/bin/python -m pip install --upgrade "setuptools>=77" wheel
    again=
    if .venv/bin/python -m pip show -q torch >/dev/null 2>&1; then again=--force-reinstall; fi
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        say "3 of 4: torch is there"
    elif has_gpu; then
        say "3 of 4: torch for CUDA (about 3 GB to download, 5 to 15 minutes)"
        quietly .venv/bin/python -m pip install $again torch
    else
        say "3 of 4: torch for the CPU (about 200 MB to download, a few minutes)"
        # From PyTorch's own index if it can be reached, else by the version that has a CPU build elsewhere.
        .venv/bin/python -m pip install -q --timeout 10 --retries 0 $again torch==2.13.0 \
            --index-url https://download.pytorch.org/whl/cpu >/dev/null 2>&1 || {
            say "  PyTorch's index cannot be reached; from the usual one (up to 3 GB)"
            quietly .venv/bin/python -m pip install $again torch==2.13.0
        }
    fi
    say "4 of 4: this project and its dependencies: $extras (about 400 MB to download, a few minutes)"
    quietly .venv/bin/python -m pip install -e ".[$extras]"
    works || { say ".venv is broken: what was installed is not there; remove it (rm -r .venv) and run this again"; exit 1; }
    touch "$stamp"
    say "done; .venv has $(du -sh .venv 2>/dev/null | cut -f 1)"
fi
