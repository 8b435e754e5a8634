#!/usr/bin/env bash
# Does the alignment stage help? SFT -> alignment -> RLVR against SFT -> RLVR, from the same SFT
# model, with the same RLVR steps and configuration, over several seeds.
#
#   bash launch/compare_alignment.sh [SEED ...]     # default 1234 1235 1236; some 14 minutes a seed on 2 cores
#
# Writes docs/results/alignment.json and docs/results/alignment.md. A run that was stopped goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
prepare_environment
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

seeds=("$@")
((${#seeds[@]})) || seeds=(1234 1235 1236)
folders=()
for seed in "${seeds[@]}"; do
    dir=runs/compare/seed-$seed
    folders+=("$dir")
    bash launch/quickstart.sh --dir "$dir" --seed "$seed"
    if [[ ! -e $dir/rlvr_direct/eval.json ]]; then
        echo "== seed $seed: RLVR from the SFT model"
        vars=("vars.dir=$dir" "vars.seed=$seed")
        torchrun --standalone --nproc-per-node 2 \
            -m prism_megatron rlvr --config configs/quickstart/rlvr.yaml "${vars[@]}" \
            "policy.path=$dir/sft/hf" "run.dir=$dir/rlvr_direct"
        python -m prism_megatron evaluate --config configs/quickstart/evaluate.yaml "${vars[@]}" \
            vars.stage=rlvr_direct
    fi
done
python -m prism_megatron.compare "${folders[@]}" --out docs/results
