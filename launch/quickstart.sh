#!/usr/bin/env bash
# All of PRISM with a tiny Qwen3-VL on a machine without a GPU, on two ranks.
#
#   bash launch/quickstart.sh [--dir DIR] [--seed N] [--smoke] [--without-alignment]
#
#   --dir DIR             run folder (default runs/quickstart)
#   --seed N              seed of everything (default 1234)
#   --smoke               a few steps of each stage: shows that it runs, trains nothing
#   --without-alignment   SFT, then RLVR at once
#
# A stage that is finished in DIR is skipped; one that was stopped goes on from its checkpoint.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

dir=$REPO/runs/quickstart seed=1234 smoke="" alignment=1
while (($#)); do
    case $1 in
        --dir) dir=${2:?--dir needs a folder}; shift 2 ;;
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        --smoke) smoke=1; shift ;;
        --without-alignment) alignment=""; shift ;;
        -h | --help) usage; exit ;;
        *) echo "quickstart.sh: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
dir=$(realpath -ms --relative-base="$REPO" "$dir")

prepare_environment

configs=configs/quickstart
RANKS=2
# one machine: ranks meet over loopback, whatever its host name resolves to
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
# so small a model only waits for a second thread
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# notes of libraries to their own developers, many times a stage
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}
# what loads under transformers comes from this run, never from the network
export HF_HUB_OFFLINE=1

# A run folder belongs to one set of arguments: finished stages of another are no part of this run.
arguments="seed=$seed smoke=$smoke alignment=$alignment"
mkdir -p "$dir/.finished"
if [[ -e $dir/.finished/arguments && $(<"$dir/.finished/arguments") != "$arguments" ]]; then
    echo "$dir was made with $(<"$dir/.finished/arguments"), now it is $arguments;" \
        "choose another --dir or remove it" >&2
    exit 2
fi
echo "$arguments" >"$dir/.finished/arguments"

# stage NAME CONFIG RANKS RESULT [OVERRIDE ...]: run one stage unless it has finished before.
stage() {
    local name=$1 config=$2 ranks=$3 result=$4
    shift 4
    if [[ -e $dir/.finished/$name && -e $dir/$result ]]; then
        echo "== $name: finished before"
        return
    fi
    local launcher=(python) options=(--config "$configs/$config.yaml")
    ((ranks == 1)) || launcher=(torchrun --standalone --nproc-per-node "$ranks")
    [[ -z $smoke ]] || options+=(--config "$configs/smoke.yaml")
    local start=$SECONDS
    echo "== $name"
    "${launcher[@]}" -m prism_megatron "$config" "${options[@]}" \
        "vars.dir=$dir" "vars.seed=$seed" "$@"
    if [[ ! -e $dir/$result ]]; then
        echo "$name ended without $dir/$result" >&2
        exit 1
    fi
    touch "$dir/.finished/$name"
    echo "== $name: $((SECONDS - start)) s"
}

stage digit-sums digit-sums 1 data
stage tiny-model tiny-model 1 tiny
stage convert convert $RANKS tiny-megatron
stage sft sft $RANKS sft/hf
stage evaluate-sft evaluate 1 sft/eval.json vars.stage=sft
if [[ -n $alignment ]]; then
    stage make-warmup-pairs make-warmup-pairs 1 pairs
    stage upcycle upcycle 1 discriminator
    stage warmup warmup $RANKS warmup/hf
    stage align align $RANKS align/hf
    stage evaluate-align evaluate 1 align/eval.json vars.stage=align
    stage rlvr rlvr $RANKS rlvr/hf
    stage evaluate-rlvr evaluate 1 rlvr/eval.json vars.stage=rlvr
    stage report report 1 report.html
else
    stage rlvr rlvr $RANKS rlvr/hf "policy.path=$dir/sft/hf"
    stage evaluate-rlvr evaluate 1 rlvr/eval.json vars.stage=rlvr
    stage report report 1 report.html "stages=[sft,rlvr]"
fi
echo "finished in $((SECONDS / 60)) min $((SECONDS % 60)) s: see $dir/report.html and $dir/summary.json"
