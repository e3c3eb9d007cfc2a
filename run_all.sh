#!/usr/bin/env bash
# Make the environment if needed, run the notebooks, build the report. ./run_all.sh --help says more.
set -eu
export SINKS_CWD="$PWD"  # relative paths start where the command was typed
script="$0"
while [ -L "$script" ]; do  # a link to this script may lie anywhere
    target="$(readlink "$script")"
    case "$target" in /*) script="$target" ;; *) script="$(dirname "$script")/$target" ;; esac
done
cd "$(dirname "$script")"

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# PYTHON names another interpreter to start from, as continuous integration does.
python=""
for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" .venv/bin/python \
    python3.11 python3.12 python3 python; do
    if [ -n "$candidate" ] && fits "$candidate"; then python="$candidate"; break; fi
done
if [ -z "$python" ] && command -v uv >/dev/null 2>&1; then
    uv python install --quiet 3.11 && python="$(uv python find 3.11)" || python=""
fi
if [ -z "$python" ]; then
    echo "error: Python must be 3.11 or newer, got $(python3 --version 2>&1 || true): install Python 3.11, or uv, and run again" >&2
    exit 2
fi

PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m lib.launch.command "$@"
