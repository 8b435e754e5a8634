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

# Several processes take test files one after the other: many tests wait, for ranks or servers. Each
# process may have ranks that take 7 GB.
workers=$(awk -v cores="$(env -u OMP_NUM_THREADS nproc)" '/^MemTotal/ {
    room = int($2 / 10e6)
    workers = room < cores ? room : cores
    print workers < 1 ? 1 : workers
}' /proc/meminfo)
# files that take long first, so that none is left over at the end
tests() {
    python -m pytest -n "$workers" --dist loadfile tests/dist tests/e2e tests/unit "$@"
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "import direction" lint-imports
check mypy mypy
check shellcheck shellcheck --severity warning --external-sources --source-path SCRIPTDIR \
    launch/*.s* .ci/run tests/fixtures/cluster/*
check tests tests "$@"

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
