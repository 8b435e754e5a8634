#!/usr/bin/env bash
# One stage on every GPU of one or more nodes; run it on each node, with the same addresses.
#
#   bash launch/torchrun.sh STAGE --config FILE [section.field=value ...]
#
#   NNODES           nodes (default 1)
#   NPROC_PER_NODE   ranks a node (default: one a GPU)
#   MASTER_ADDR      host of the rendezvous (default: this one)
#   MASTER_PORT      its port (default 29500)
#   RUN_ID           name of the run at the rendezvous (default prism-megatron)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$root/.venv/bin:$PATH
exec torchrun \
    --nnodes "${NNODES:-1}" \
    --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" \
    --rdzv-id "${RUN_ID:-prism-megatron}" \
    -m prism_megatron "$@"
