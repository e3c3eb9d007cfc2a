#!/usr/bin/env bash
# Make the environment if needed, then check everything, fastest first. --quick leaves out the notebooks' validation (nbval).
# Other words go to pytest: ./run_tests.sh --quick -k sinks
set -u
cd "$(dirname "$0")"

quick=""
if [ "${1:-}" = "--quick" ]; then quick=yes; shift; fi
if [ "${1:-}" = "--help" ]; then sed -n 's/^# //p' "$0"; exit 0; fi

exports="$(SINKS_GROUPS=cluster ./run_all.sh --environment)" || exit $?  # the group has Ray, which the tests of the grid start
eval "$exports"
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

# What the notebooks write while they are validated must not touch the committed figures and results.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

failed=""
check() { # name, command...
    name="$1"; shift
    echo "== $name"
    "$@" || failed="$failed $name"
}
# Said before the last step, because the last line of all is pytest's own summary.
warn() { if [ -n "$failed" ]; then echo "== not passed so far:$failed (the exit code will be 1)"; fi; }

check ruff "$SINKS_PYTHON" -m ruff check --quiet .
check format "$SINKS_PYTHON" -m ruff format --check --quiet .
check pyright "$SINKS_PYTHON" -m pyright --pythonpath "$SINKS_PYTHON" --warnings
if [ -n "$quick" ]; then warn; fi
# Two workers with one thread each are faster on small tensors than one with two.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0
check tests "$SINKS_PYTHON" -m pytest -q -n 2 --dist loadscope "$@"
if [ -z "$quick" ]; then
    warn
    export SINKS_OUTPUT="$scratch"
    check notebooks "$SINKS_PYTHON" -m pytest -q -n 2 --dist loadfile -p no:cacheprovider -p tests.notebooks.nbval_stderr \
        --nbval-lax --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg notebooks
fi

[ -z "$failed" ]
