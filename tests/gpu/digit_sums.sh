#!/usr/bin/env bash
# Alignment and RLVR of 30 steps each on the quickstart's data, on one GPU, with responses from SGLang.
#
#   bash tests/gpu/digit_sums.sh OUT MODEL
#
# MODEL: Hugging Face directory of a small random model, such as DIR/dense/bf16 of served_models.py,
# with DIR/tiny's generation_config.json. The stages' metrics come to OUT.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
model=$2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run=$(mktemp -d)
stage() {
    local name=$1
    shift
    local started=$SECONDS
    python3 -m prism_megatron "$name" --config "configs/quickstart/$name.yaml" "$@" \
        "vars.dir=$run" >"$out/$name.log" 2>&1 ||
        { echo "$name: FAILED"; tail -n 5 "$out/$name.log" "$run"/*/engines/*.log; exit 1; }
    echo "$name: $((SECONDS - started)) s"
    [[ ! -e $run/$name/metrics.jsonl ]] || cp "$run/$name/metrics.jsonl" "$out/$name.jsonl"
}
sglang=(--config tests/gpu/sglang.yaml train.steps=30)
stage digit-sums train_rows=4000 heldout_rows=10
stage sft backend=cuda "model.path=$model" model.parallel.tensor=1 train.steps=400
stage rlvr "${sglang[@]}" "policy.path=$run/sft/hf" policy.parallel.tensor=1
stage upcycle
stage pairs backend=cuda data.path="$run/data/prompts.parquet"
stage warmup backend=cuda model.parallel.expert=1 train.steps=100
stage align "${sglang[@]}" policy.parallel.tensor=1 discriminator.parallel.expert=1
