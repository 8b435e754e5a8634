#!/usr/bin/env bash
# Every check that runs without a GPU. Arguments go to pytest, e.g. `bash launch/test.sh -k config`.
set -uo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare_environment dev || exit 1
# ranks and test data share the cores: more threads than one only wait for each other
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} HF_HUB_OFFLINE=1

failed=()
check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

# beside the tests, of which many wait for one another
types=$(mktemp)
mypy >"$types" 2>&1 &
checking_types=$!
report_types() {
    wait "$checking_types"
    local status=$?
    cat "$types"
    rm "$types"
    return $status
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "import direction" lint-imports
check pytest python -m pytest tests/unit tests/dist tests/e2e "$@"
check mypy report_types

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
