#!/usr/bin/env bash
# Alignment and RLVR of 30 steps each on the quickstart's data, with responses from SGLang servers on
# the trainers' GPUs, which sleep while these train: on one GPU, and on two where there are. There
# also RLVR with a server on a GPU of its own, which samples ahead.
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
# stage NAME RANKS RESULT [OVERRIDE ...]
stage() {
    local name=$1 ranks=$2 result=$3 started=$SECONDS
    shift 3
    python3 -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
        -m prism_megatron "$name" --config "configs/quickstart/$name.yaml" "$@" \
        "vars.dir=$run" >"$out/$result.log" 2>&1 ||
        { echo "$result: FAILED"; tail -n 5 "$out/$result.log" "$run"/*/engines/*.log; exit 1; }
    echo "$result: $((SECONDS - started)) s"
    [[ ! -e $run/$result/metrics.jsonl ]] || cp "$run/$result/metrics.jsonl" "$out/$result.jsonl"
}
stage digit-sums 1 data train_rows=4000 heldout_rows=10
stage sft 1 sft backend=cuda "model.path=$model" model.parallel.tensor=1 train.steps=200
stage upcycle 1 discriminator
stage make-warmup-pairs 1 pairs backend=cuda data.path="$run/data/prompts.parquet"
stage warmup 1 warmup backend=cuda model.parallel.expert=1 train.steps=100
available=$(nvidia-smi -L | wc -l)
common=(--config tests/gpu/sglang.yaml train.steps=30)
for gpus in 1 2; do
    ((gpus <= available)) || break
    served=(
        "${common[@]}" "rollout.gpus=[$(seq -s, 0 $((gpus - 1)))]" "rollout.engines=$gpus"
        "policy.parallel.tensor=$gpus"
    )
    stage align "$gpus" "align-$gpus" "${served[@]}" "discriminator.parallel.expert=$gpus" \
        "run.dir=$run/align-$gpus"
    stage rlvr "$gpus" "rlvr-$gpus" "${served[@]}" "policy.path=$run/sft/hf" \
        "run.dir=$run/rlvr-$gpus"
done
((available < 2)) || stage rlvr 1 rlvr-ahead "${common[@]}" "rollout.gpus=[1]" rollout.sleep=false \
    rollout.ahead=true rollout.partial=true rollout_is=tis validation=null policy.parallel.tensor=1 \
    "policy.path=$run/sft/hf" "run.dir=$run/rlvr-ahead"
