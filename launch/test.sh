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

# beside NAME COMMAND...: a check that runs while the tests of several ranks wait for one another
names=() logs=() pids=()
beside() {
    names+=("$1") logs+=("$(mktemp)")
    shift
    "$@" >"${logs[-1]}" 2>&1 &
    pids+=($!)
}
report() {
    wait "${pids[$1]}"
    local status=$?
    cat "${logs[$1]}"
    rm "${logs[$1]}"
    return $status
}
# a selection by arguments may leave nothing of one folder
tests() {
    python -m pytest "$@"
    local status=$?
    ((status == 5 && $# > 1)) || return $status
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "import direction" lint-imports
beside mypy mypy
beside "tests/unit" tests tests/unit "$@"
check "tests/dist" tests tests/dist "$@"
check "tests/e2e" tests tests/e2e "$@"
for i in "${!names[@]}"; do
    check "${names[i]}" report "$i"
done

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
