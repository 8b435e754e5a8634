#!/usr/bin/env bash
# One stage on one or more nodes; run it on each of them.
#
#   bash launch/torchrun.sh [--dry-run] STAGE --config FILE [section.field=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch/torchrun.sh ...     # and NODE_RANK=1 there
#
# `bash launch/torchrun.sh --help` lists all variables.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$root/.venv/bin:$PATH
exec python "$root/launch/node.py" "$@"
