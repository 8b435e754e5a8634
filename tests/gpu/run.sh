#!/usr/bin/env bash
# Everything there is to check and to measure on this host's GPUs; one JSON a part.
#
#   bash tests/gpu/run.sh OUT [PART ...]
#
# Parts: logits parity resume fp8params offload curves host save dense fp8 experts moe baseline served
# sync rollouts; all by default. What is checked on more ranks than there are GPUs shares them
# (tests.gpu.shared_gpu): its numbers are right, its times say nothing. What is measured there is
# skipped and says so, and so are `served`, `sync` and `rollouts` where SGLang is not installed. Ends
# with a table, and with 1 if any part failed.
# CPU_PYTHONPATH: packages without Transformer Engine, for the fp32 reference on a host where
# megatron.core must not find it. VLLM_PYTHONPATH: packages of vLLM, which wants other versions. SAVES:
# where `save` writes its checkpoints, 28 and 46 GiB; OUT by default.
set -uo pipefail
out=${1:?usage: run.sh OUT [PART ...]}
shift
parts=("$@")
((${#parts[@]})) || parts=(logits parity resume fp8params offload curves host save dense fp8 experts moe baseline served sync rollouts)
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
((gpus)) || { echo "no GPU is visible" >&2; exit 1; }

port=29500
# finish NAME COMMAND ...: run it, its log beside its result
finish() {
    local name=$1 started=$SECONDS
    shift
    if timeout 600 "$@" >"$out/$name.log" 2>&1; then
        echo "$name: passed in $((SECONDS - started)) s"
    else
        echo "$name: FAILED after $((SECONDS - started)) s"
        grep -v -i warning "$out/$name.log" | grep -E "Error|assert" | tail -n 3
        touch "$out/failed"
    fi
}

# job NAME FIRST_GPU COUNT MODULE [ARGUMENT ...]: check on these GPUs, with as many ranks unless $ranks
# is set
job() {
    local name=$1 first=$2 count=$3 module=(-m "tests.gpu.$4") processes=${ranks:-$3}
    shift 4
    if ((count > gpus)); then
        module=(-m tests.gpu.shared_gpu "${module[1]}") first=0 count=$gpus
    fi
    # one of its own by name, since several jobs run at once
    local own=$((port + $(cksum <<<"$name" | cut -d' ' -f1) % 1000))
    CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + count - 1))) finish "$name" \
        python3 -m torch.distributed.run --nproc-per-node "$processes" --master-port $own \
        "${module[@]}" "$@" --out "$out/$name.json"
}

# measure NAME COUNT MODULE [ARGUMENT ...]: on GPUs that nothing else runs on
measure() {
    local name=$1 count=$2
    shift 2
    if ((count > gpus)); then
        echo "$name: skipped, wants $count of $gpus GPUs"
        return
    fi
    CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((count - 1))) finish "$name" \
        python3 -m torch.distributed.run --nproc-per-node "$count" --master-port $port -m "$@"
}

# bench NAME COUNT [ARGUMENT ...]: `prism-megatron bench train`, whose results go to NAME/
bench() {
    local name=$1 count=$2
    shift 2
    measure "$name" "$count" prism_megatron bench train --backend cuda "$@" --out "$out/$name"
}

# from FIRST COUNT: FIRST, or 0 where there are not COUNT more, for jobs that can share a GPU
from() { echo $(($1 + $2 <= gpus ? $1 : 0)); }

# reference_run DIR [--tied]: what the CPU backend finds in fp32
reference_run() {
    PYTHONPATH=${CPU_PYTHONPATH:-${PYTHONPATH:-}} CUDA_VISIBLE_DEVICES="" \
        python3 -m tests.gpu.check_cuda_backend reference "$@" >"$out/reference.log" 2>&1 ||
        { echo "reference: FAILED"; tail -n 3 "$out/reference.log"; touch "$out/failed"; return 1; }
}

parity() {
    local reference
    reference=$(mktemp -d)
    reference_run "$reference" || return
    job parity-1 0 1 check_cuda_backend compare "$reference" &
    job parity-cp2 "$(from 1 2)" 2 check_cuda_backend compare "$reference" --context 2 &
    wait
    job parity-dp2 0 2 check_cuda_backend compare "$reference" &
    job parity-ep2 "$(from 2 2)" 2 check_cuda_backend compare "$reference" --expert 2 &
    wait
    job parity-tp2-ep2 0 2 check_cuda_backend compare "$reference" --tensor 2 --expert 2 &
    job parity-pp2-vpp2 "$(from 2 2)" 2 check_cuda_backend compare "$reference" --pipeline 2 \
        --virtual-pipeline 2 &
    wait
    job parity-tp2-tower 0 2 check_cuda_backend compare "$reference" --tensor 2 --vision replicated
    job parity-tp2-cp2 0 4 check_cuda_backend compare "$reference" --tensor 2 --context 2
    job parity-ep4 0 4 check_cuda_backend compare "$reference" --expert 4
    rm -rf "${reference:?}"/*
    if reference_run "$reference" --tied; then
        job tied-pp2 0 4 check_cuda_backend compare "$reference" --tied --pipeline 2
    fi
    rm -rf "$reference"
}

resume() {
    job resume-1 0 1 check_resume &
    job resume-tp2-ep2 "$(from 1 2)" 2 check_resume --tensor 2 --expert 2 &
    job resume-bf16-moments "$(from 3 1)" 1 check_resume --moments bfloat16 --offload &
    wait
    job resume-offload-tp2-ep2 0 2 check_resume --tensor 2 --expert 2 --moments bfloat16 --offload
}

fp8params() {
    job fp8-params-tensorwise 0 1 check_fp8_params --recipe tensorwise &
    job fp8-params-blockwise "$(from 1 1)" 1 check_fp8_params --recipe blockwise --offload \
        --moments bfloat16 &
    wait
    job fp8-params-ep2 0 2 check_fp8_params --recipe tensorwise --expert 2
}

offload() {
    job offload-bf16 0 1 check_offload &
    job offload-tensorwise "$(from 1 1)" 1 check_offload --fp8 tensorwise &
    wait
    job offload-ep2 0 2 check_offload --expert 2
}

curves() {
    local gpu=0 model recipe files
    for model in qwen3-vl-8b qwen3-vl-30b-a3b; do
        files=()
        for recipe in bf16 delayed tensorwise blockwise; do
            job "curve-$model-$recipe" $gpu 1 fp8_curves --model $model --precision $recipe &
            files+=("$out/curve-$model-$recipe.json")
            gpu=$(((gpu + 1) % gpus))
            ((gpu)) || wait
        done
        wait
        python3 -m tests.gpu.fp8_curves --plot "$out/fp8_curves-$model.png" "${files[@]}"
    done
}

# 8B's width on one GPU: how long the device waits for the host
host() {
    local shape=(--model qwen3-vl-8b --moments bfloat16) recipe
    for recipe in off tensorwise; do
        bench host-16-layers-$recipe 1 "${shape[@]}" --layers 16 --rows 8 --fp8 $recipe \
            --profile "$out/host-16-layers-$recipe.txt"
        bench host-12-layers-16k-$recipe 1 "${shape[@]}" --layers 12 --rows 12 --fp8 $recipe \
            --micro-batch-tokens 16384 --profile "$out/host-12-layers-16k-$recipe.txt"
        # all of 8B, with room for its activations alone
        bench dense-1gpu-offload-$recipe 1 "${shape[@]}" --offload --rows 32 --fp8 $recipe \
            --micro-batch-tokens 12288 --steps 3 --profile "$out/dense-1gpu-offload-$recipe.txt"
    done
}
# what training waits for checkpoints that are written beside it
save() {
    bench save-2b 1 --model qwen3-vl-2b --rows 8 --save "${SAVES:-$out}"
    bench save-16-layers-2gpu 2 --model qwen3-vl-8b --layers 16 --rows 8 --moments bfloat16 \
        --save "${SAVES:-$out}"
}

dense() {
    bench dense-bf16 4 --model qwen3-vl-8b --rows 8 --profile "$out/dense-bf16.txt"
    bench dense-2gpu 2 --model qwen3-vl-8b --rows 8 --moments bfloat16 \
        --profile "$out/dense-2gpu.txt"
}
fp8() {
    local recipe
    for recipe in tensorwise blockwise delayed; do
        bench "dense-$recipe" 4 --model qwen3-vl-8b --rows 8 --fp8 $recipe \
            --profile "$out/dense-$recipe.txt"
    done
}
experts() { job experts 0 1 check_experts; }
moe() {
    local flags=(--model qwen3-vl-30b-a3b --expert 4 --rows 8 --recompute-vision)
    local few=(--model qwen3-vl-30b-a3b --layers 12 --expert 2 --moments bfloat16)
    bench moe-12-layers-ep2 2 "${few[@]}" --rows 8 --profile "$out/moe-12-layers-ep2.txt"
    local recipe
    for recipe in off tensorwise; do
        bench moe-12-layers-ep2-16k-$recipe 2 "${few[@]}" --rows 16 --micro-batch-tokens 16384 \
            --fp8 $recipe --profile "$out/moe-12-layers-ep2-16k-$recipe.txt"
        bench moe-235b-2-layers-16k-$recipe 1 --model qwen3-vl-235b-a22b --layers 2 --rows 12 \
            --micro-batch-tokens 16384 --moments bfloat16 --fp8 $recipe
    done
    # all of it, with 122 GB of host memory for each
    bench moe-ep2-offload 2 --model qwen3-vl-30b-a3b --expert 2 --moments bfloat16 --offload \
        --rows 16 --micro-batch-tokens 16384 --recompute full --recompute-vision
    bench moe-bf16 4 "${flags[@]}" --moments bfloat16 --micro-batch-tokens 4096 \
        --profile "$out/moe-bf16.txt"
}
baseline() {
    measure baseline-fsdp2 4 tests.gpu.bench_hf_fsdp2 --model qwen3-vl-8b --rows 8 --steps 3 \
        --out "$out/baseline-fsdp2.json"
}

# checkpoints to ask about: $CHECKPOINTS, or made here
checkpoints=${CHECKPOINTS:-$out/checkpoints}
made() {
    [[ -e $checkpoints/questions.json ]] && return
    PYTHONPATH=${CPU_PYTHONPATH:-${PYTHONPATH:-}} CUDA_VISIBLE_DEVICES="" \
        python3 -m tests.gpu.served_models make "$checkpoints" >"$out/made.log" 2>&1 ||
        { echo "making checkpoints: FAILED"; tail -n 3 "$out/made.log"; touch "$out/failed"; return 1; }
}
logits() { made && job logits 0 1 served_models logprobs "$checkpoints"; }
served() {
    local engine packages
    for engine in sglang vllm; do
        packages=${PYTHONPATH:-}
        [[ $engine == sglang ]] || packages=${VLLM_PYTHONPATH:-$packages}
        if ! PYTHONPATH=$packages python3 -c "import $engine" 2>/dev/null; then
            echo "served-$engine: skipped, $engine is not installed"
        elif made && PYTHONPATH=$packages CUDA_VISIBLE_DEVICES=0 \
            python3 -m tests.gpu.check_served "$checkpoints" --engine $engine \
            --out "$out/served-$engine.json" >"$out/served-$engine.log" 2>&1; then
            echo "served-$engine: passed"
        else
            echo "served-$engine: FAILED"
            tail -n 5 "$out/served-$engine.log"
            touch "$out/failed"
        fi
    done
}

has_sglang() {
    python3 -c "import checkpoint_engine, sglang" 2>/dev/null && return
    echo "$1: skipped, SGLang or checkpoint-engine is not installed"
    return 1
}
sync() {
    has_sglang sync && made || return 0
    job sync-dense 0 1 check_sync "$checkpoints" --kind dense
    job sync-moe 0 1 check_sync "$checkpoints" --kind moe
    job sync-4b 0 1 check_sync "$checkpoints" --preset qwen3-vl-4b
    job sync-8b 0 1 check_sync "$checkpoints" --preset qwen3-vl-8b
    # FP8 against BF16: what is loaded, what log-probabilities become, and how long a sync takes
    for kind in dense moe; do
        job sync-$kind-fp8 0 1 check_sync "$checkpoints" --kind $kind --quantization fp8-block
    done
    for size in 4b 8b; do
        job sync-$size-fp8 0 1 check_sync "$checkpoints" --preset qwen3-vl-$size \
            --quantization fp8-block
    done
    # all of it on one GPU, trainer and engine
    job sync-30b-a3b 0 1 check_sync "$checkpoints" --preset qwen3-vl-30b-a3b
    # a server takes no GPU twice
    local -i engine_tensor=$((gpus > 1 ? 2 : 1))
    job sync-dense-tp2 0 2 check_sync "$checkpoints" --kind dense --tensor 2 \
        --engine-tensor $engine_tensor
    job sync-moe-ep2 0 2 check_sync "$checkpoints" --kind moe --expert 2
    # in parts
    job sync-moe-parts 0 1 check_sync "$checkpoints" --kind moe --bucket-mib 1
    # as on two hosts, to which each weight goes once
    job sync-moe-pp2-ep2 0 4 check_sync "$checkpoints" --kind moe --pipeline 2 --expert 2 --hosts 2
    job sync-4b-tp4 0 4 check_sync "$checkpoints" --preset qwen3-vl-4b --tensor 4
    ((gpus == 1)) || for size in 4b 8b; do
        job sync-$size-tp2 0 2 check_sync "$checkpoints" --preset qwen3-vl-$size --tensor 2
    done
    ((gpus == 1)) || job sync-4b-tp4-tp2 0 4 check_sync "$checkpoints" --preset qwen3-vl-4b \
        --tensor 4 --engine-tensor 2
    # one that is started again and one that lives on
    ranks=1 job sync-dense-apart 0 3 check_sync "$checkpoints" --kind dense --apart 2
    ((gpus == 1)) || ranks=1 job sync-dense-apart-tp2 0 3 check_sync "$checkpoints" --kind dense \
        --apart 1 --engine-tensor 2
    ranks=1 job sync-moe-apart 0 2 check_sync "$checkpoints" --kind moe --apart 1
    # whose times are those of two GPUs
    ((gpus == 1)) || for size in 4b 8b; do
        ranks=1 job sync-$size-apart 0 2 check_sync "$checkpoints" --preset qwen3-vl-$size --apart 1
    done
    # each rank has what is not of experts, besides
    ((gpus == 1)) || job sync-30b-a3b-ep2 0 2 check_sync "$checkpoints" --preset qwen3-vl-30b-a3b \
        --expert 2 --engine-tensor $engine_tensor
    # over NCCL's sockets, where ranks share GPUs, one sync takes half a minute
    local cycles=$((gpus < 4 ? 1 : 10))
    ((gpus == 1)) || job sync-30b-a3b-ep4 0 4 check_sync "$checkpoints" --preset qwen3-vl-30b-a3b \
        --expert 4 --engine-tensor $engine_tensor --cycles $cycles
    if [[ -z ${VLLM_PYTHONPATH:-} ]]; then
        echo "sync with vLLM: skipped, VLLM_PYTHONPATH is not set"
        return
    fi
    local -x ENGINE_PYTHONPATH=$VLLM_PYTHONPATH
    for kind in dense moe; do
        job sync-$kind-vllm 0 1 check_sync "$checkpoints" --kind $kind --engine vllm
    done
    job sync-moe-vllm-parts 0 1 check_sync "$checkpoints" --kind moe --engine vllm --bucket-mib 1
    job sync-dense-vllm-fp8 0 1 check_sync "$checkpoints" --kind dense --engine vllm \
        --quantization fp8-block
    job sync-4b-vllm 0 1 check_sync "$checkpoints" --preset qwen3-vl-4b --engine vllm
}
rollouts() {
    has_sglang rollouts && made || return 0
    job rollouts-4b 0 1 check_rollouts "$checkpoints"
    finish cut-off python3 -m tests.gpu.check_cut_off "$checkpoints" --out "$out/cut-off.json"
    local model
    model=$(mktemp -d)
    cp "$checkpoints"/dense/bf16/* "$model"
    cp "$checkpoints/tiny/generation_config.json" "$model"
    bash tests/gpu/digit_sums.sh "$out/digit-sums" "$model" || touch "$out/failed"
    rm -rf "$model"
}

rm -f "$out/failed"
for part in "${parts[@]}"; do
    case $part in
        logits | parity | resume | fp8params | offload | curves | host | save | dense | fp8 | experts | moe | \
            baseline | served | sync | rollouts)
            "$part"
            ;;
        *) echo "run.sh: unknown part $part" >&2; exit 2 ;;
    esac
done
python3 -m tests.gpu.parity "$out" && [[ ! -e $out/failed ]]
