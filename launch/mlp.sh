#!/usr/bin/env bash
# One stage where a platform sets the variables that the reference's launch.sh reads; run it on each node.
#
#   bash launch/mlp.sh [--dry-run] STAGE --config FILE [section.field=value ...]
#
#   MLP_WORKER_NUM               nodes
#   MLP_WORKER_RACK_RANK_INDEX   number of this node, 0 on the first
#   MLP_WORKER_0_HOST            the first node
#   MLP_WORKER_0_PORT            first of three ports of it (default 10086)
#   MLP_WORKER_GPU               GPUs of a node (default: those that there are)
#   SINGLENODE=true              one node, this one, whatever the others say
#
# The exit status is the stage's, also with SINGLENODE.
set -euo pipefail

case ${SINGLENODE:-false} in
    true)
        export NNODES=1 NODE_RANK=0
        unset MASTER_ADDR
        ;;
    false)
        missing=()
        for name in MLP_WORKER_NUM MLP_WORKER_RACK_RANK_INDEX MLP_WORKER_0_HOST; do
            [[ -n ${!name:-} ]] || missing+=("$name")
        done
        if ((${#missing[@]})); then
            echo "mlp.sh: ${missing[*]} missing; for one node set SINGLENODE=true" >&2
            exit 2
        fi
        export NNODES=$MLP_WORKER_NUM NODE_RANK=$MLP_WORKER_RACK_RANK_INDEX
        export MASTER_ADDR=$MLP_WORKER_0_HOST
        ;;
    *)
        echo "mlp.sh: SINGLENODE is true or false, not $SINGLENODE" >&2
        exit 2
        ;;
esac
export MASTER_PORT=${MLP_WORKER_0_PORT:-10086}
[[ -z ${MLP_WORKER_GPU:-} ]] || export NPROC_PER_NODE=$MLP_WORKER_GPU
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" "$@"
