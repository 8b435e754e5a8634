"""Do engines serve our exports and quantised checkpoints as Megatron computes them?

    python -m tests.gpu.check_served DIR --engine sglang --out FILE
    python -m tests.gpu.check_served DIR --engine vllm --out FILE

DIR is what tests/gpu/served_models.py wrote. Every checkpoint is loaded by an engine of its own,
several at a time on one GPU, and asked for the log-probabilities of the same responses. Every
export is served in fp32 as well, where the engine can: BF16 rounds, so that only there each token
has to agree. This file needs the engine alone, whose environment need not be the training one.
Prints a table; exit status 1 unless every export agrees with Megatron and every quantised one is
close to the BF16 one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

AGREES = 0.01
"""Distance of log-probabilities between an engine and Megatron: in fp32 the largest."""
AGREES_BF16 = {"dense": 0.01, "moe": 0.03}
"""The same in BF16, the mean over response tokens: rounding sends some tokens of a random Mixture
of Experts to other experts."""
FP32 = "fp32"
CLOSE = {"fp8-block": 0.15, "fp8": 0.15, "nvfp4": 0.5}
"""The same between a quantised checkpoint and the BF16 one, both in an engine, and between it and
transformers in fp32 with what its matrices stand for."""
OPTIONAL = ("nvfp4", FP32)
"""Engines may refuse them: on a GPU without FP4 arithmetic, and without kernels for fp32."""
AT_ONCE = 5
TOKENS = 2048

Answers = list[list[float]]


def ask(
    engine: str, model: Path, dtype: str, questions: list[dict[str, Any]], folder: Path
) -> Answers:
    """Log-probabilities of each question's response tokens."""
    images = [[Image.open(folder / name) for name in q["images"]] for q in questions]
    answers = (_ask_sglang if engine == "sglang" else _ask_vllm)(model, dtype, questions, images)
    for number, (question, (tokens, found)) in enumerate(zip(questions, answers, strict=True)):
        length = question["prompt_tokens"] + len(question["response"])
        ids = [token for token, _ in found]
        if tokens != length or ids != question["response"]:
            raise ValueError(
                f"question {number}: {length} tokens with the response {question['response']} were "
                f"meant, the engine saw {tokens} with {ids}"
            )
    return [[logprob for _, logprob in found] for _, found in answers]


Found = list[tuple[int, list[tuple[int, float]]]]
"""For each question: tokens that the engine saw, and (id, log-probability) of the response's."""


def _ask_sglang(
    model: Path, dtype: str, questions: list[dict[str, Any]], images: list[list[Any]]
) -> Found:
    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        dtype=dtype,
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        mm_attention_backend="sdpa",
        # others come and go on the same GPU, so what is free is no measure of what to take
        mem_fraction_static=0.9,
        max_total_tokens=TOKENS,
        disable_cuda_graph=True,
        disable_radix_cache=True,
        context_length=TOKENS,
        port=30000 + os.getpid() % 20000,
        log_level="error",
    )
    found = []
    for question, shown in zip(questions, images, strict=True):
        answer = engine.generate(
            input_ids=question["prompt"] + question["response"],
            image_data=shown or None,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=question["prompt_tokens"] - 1,
        )
        meta = answer["meta_info"]
        rows = meta["input_token_logprobs"][-len(question["response"]) :]
        found.append((meta["prompt_tokens"], [(token, logprob) for logprob, token, *_ in rows]))
    engine.shutdown()
    return found


def _ask_vllm(
    model: Path, dtype: str, questions: list[dict[str, Any]], images: list[list[Any]]
) -> Found:
    # which compile kernels first, or at each new size, for minutes
    os.environ |= {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    import vllm

    engine = vllm.LLM(
        model=str(model),
        dtype=dtype,
        gpu_memory_utilization=0.1,
        # others come and go on the same GPU, so what is free is no measure of what to take
        kv_cache_memory_bytes=2**28,
        skip_mm_profiling=True,
        max_model_len=TOKENS,
        enforce_eager=True,
        # the others compile kernels for every size, for minutes
        moe_backend="triton",
        limit_mm_per_prompt={"image": 2},
    )
    settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found = []
    for question, shown in zip(questions, images, strict=True):
        prompt: dict[str, Any] = {"prompt_token_ids": question["prompt"] + question["response"]}
        if shown:
            prompt["multi_modal_data"] = {"image": shown}
        [answer] = engine.generate([prompt], settings, use_tqdm=False)
        count = len(question["response"])
        ids = answer.prompt_token_ids[-count:]
        rows = zip(ids, answer.prompt_logprobs[-count:], strict=True)
        found.append(
            (len(answer.prompt_token_ids), [(token, row[token].logprob) for token, row in rows])
        )
    return found


def distance(a: Answers, b: Answers) -> dict[str, float]:
    """Mean and largest distance over all response tokens."""
    apart = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return {"mean": sum(apart) / len(apart), "largest": max(apart)}


def serve(directory: Path, engine: str) -> dict[str, Any]:
    """Every checkpoint in `directory` in an engine of its own; what there is to compare."""
    cases = [
        (kind, form, path)
        for kind in ("dense", "moe")
        for form in ("bf16", FP32, *CLOSE)
        if (path := directory / kind / ("bf16" if form == FP32 else form)).is_dir()
    ]

    def one(case: tuple[str, str, Path]) -> tuple[Answers | None, str, float]:
        kind, form, model = case
        out = directory / f"{engine}-{kind}-{form}.json"
        command = [sys.executable, "-m", "tests.gpu.check_served", str(directory)]
        command += ["--engine", engine, "--ask", str(model), "--out", str(out)]
        command += ["--dtype", "float32" if form == FP32 else "bfloat16"]
        started = time.monotonic()
        log = out.with_suffix(".log")
        with log.open("w") as file:
            try:
                status = subprocess.run(command, stdout=file, stderr=file, timeout=280).returncode
            except subprocess.TimeoutExpired:
                status = 124
        seconds = time.monotonic() - started
        print(f"{kind} {form}: exit {status}, {seconds:.0f} s")
        if status:
            errors = [line for line in log.read_text().splitlines() if "Error" in line]
            return None, (errors or [f"exit {status}, no error in the log"])[-1].strip(), seconds
        return json.loads(out.read_text()), "", seconds

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(one, cases))
    report: dict[str, Any] = {}
    for (kind, form, path), (answers, error, seconds) in zip(cases, found, strict=True):
        part = report.setdefault(kind, {})
        if form == "bf16":
            plain = answers
        if answers is None:
            part[form] = {"error": error}
            continue
        part[form] = entry = {"engine_seconds": round(seconds, 1)}
        for reference in ("cpu", "cuda"):
            file = path.parent / f"{reference}.json"
            if file.exists():
                entry[f"to_megatron_{reference}"] = distance(answers, json.loads(file.read_text()))
        if (file := path.parent / f"{form}.json").exists():
            entry["to_dequantized"] = distance(answers, json.loads(file.read_text()))
        if form in ("bf16", FP32):
            # question 8 asks what question 0 asks, about another picture
            entry["between_two_images"] = distance([answers[0]], [answers[8]])
            everything = [logprob for answer in answers for logprob in answer]
            entry["range"] = [min(everything), max(everything)]
        else:
            entry["to_bf16"] = distance(answers, plain) if plain else None
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What does not agree, in words."""
    wrong = []
    for kind, forms in report.items():
        for form, entry in forms.items():
            if "error" in entry:
                if form not in OPTIONAL:
                    wrong.append(f"{kind} {form}: {entry['error']}")
                continue
            if form == FP32:
                if entry["to_megatron_cpu"]["largest"] > AGREES:
                    wrong.append(f"{kind} {form}: {entry['to_megatron_cpu']} to_megatron_cpu")
                continue
            if form != "bf16":
                for name in ("to_bf16", "to_dequantized"):
                    if entry[name] and entry[name]["mean"] > CLOSE[form]:
                        wrong.append(f"{kind} {form}: {entry[name]} {name}")
                if entry["to_bf16"] and entry["to_bf16"]["mean"] < entry["to_dequantized"]["mean"]:
                    wrong.append(f"{kind} {form}: nearer to bf16 than to what was quantised")
                continue
            for name in ("to_megatron_cpu", "to_megatron_cuda"):
                if name in entry and entry[name]["mean"] > AGREES_BF16[kind]:
                    wrong.append(f"{kind} {form}: {entry[name]} {name}")
            if entry["between_two_images"]["mean"] < 5 * AGREES:
                wrong.append(f"{kind} {form}: the image makes no difference")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--engine", choices=("sglang", "vllm"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", type=Path, help="one checkpoint alone; its log-probabilities")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    questions = json.loads((options.directory / "questions.json").read_text())
    if options.ask:
        answers = ask(options.engine, options.ask, options.dtype, questions, options.directory)
        options.out.write_text(json.dumps(answers))
        return 0
    report = serve(options.directory, options.engine)
    wrong = problems(report)
    names = (options.engine, "torch", "transformers")
    report["versions"] = {name: importlib.metadata.version(name) for name in names}
    options.out.write_text(json.dumps(report | {"problems": wrong}, indent=2) + "\n")
    print(options.out.read_text())
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
