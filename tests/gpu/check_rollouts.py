"""Responses a second from a server by our client, and from the engine alone, for the same requests.

    python -m tests.gpu.check_rollouts DIR --out FILE [--preset NAME]

A model of true shape with random weights, prompts of a 448 x 448 image and text, each sampled
several times to a fixed length. `server`: by the client over HTTP, from token ids and pixels, with
log-probabilities. `offline`: the engine's own class in this process, which reads the same ids and
pixels. Both run on one GPU, one after the other, and are warmed up with other prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_providers import backend as backends
from model_providers import presets
from model_providers.architecture import Qwen3VLConfig
from prism_megatron.bench import workload
from prism_megatron.config.schema import Sampling
from prism_megatron.rollout import sglang
from prism_megatron.rollout.server import outside_of_ranks
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt, VisualInputs
from tests.gpu.check_sync import ServerProcess, sample, true_shape

GRID = (1, 28, 28)
OPTIONS = "--attention-backend triton --sampling-backend pytorch --grammar-backend none "
OPTIONS += "--mm-attention-backend sdpa --mem-fraction-static 0.5 --max-running-requests 256"


WORDS = (1000, 100_000)
"""Ids that are of ordinary tokens."""


def prompts(path: Path, count: int, text: int, seed: int) -> list[Prompt]:
    """`count` prompts of `text` random tokens and an image of their own."""
    config = Qwen3VLConfig.from_hf(path)
    start = json.loads((path / "config.json").read_text())["vision_start_token_id"]
    generator = torch.Generator().manual_seed(seed)
    visual = GRID[1] * GRID[2] // config.vision.spatial_merge_size**2
    found = []
    for number in range(count):
        ids = torch.randint(*WORDS, (text,), generator=generator)
        # a still image of 8 bits a channel
        frame = torch.randint(256, (GRID[1] * GRID[2], 3, 1, 16, 16), generator=generator)
        pixels = (frame / 127.5 - 1).expand(-1, -1, 2, -1, -1).reshape(len(frame), -1)
        placed = [start, *[config.image_token_id] * visual]
        head, tail = ids[: text // 2].tolist(), ids[text // 2 :].tolist()
        row = f"{seed}/{number}"
        image = VisualInputs(row, pixels, GRID)
        found.append(Prompt(row, (*head, *placed, *tail), (image,)))
    return found


def server(
    path: Path, work: list[list[Prompt]], sampling: Sampling, log: Path, gpu: str
) -> dict[str, float]:
    """By the client, over HTTP."""
    process = ServerProcess("sglang", path, [gpu], OPTIONS.split(), log, 31700)

    def ask(asked: list[Prompt]) -> int:
        answers = asyncio.run(sample(process.engine, asked, sampling))
        return sum(len(rollout.ids) for group in answers for rollout in group)

    try:
        process.wait(400)
        return timed(ask, work)
    finally:
        process.stop()


def offline(path: Path, work: list[list[Prompt]], sampling: Sampling, out: Path) -> None:
    """By the engine itself; a process of its own, whose environment the engine needs set."""
    from sglang import Engine
    from sglang.srt.server_args import prepare_server_args

    command, _ = sglang.server_command(
        path, host="127.0.0.1", port=31800, api_key="", options=OPTIONS.split()
    )
    engine = Engine(server_args=prepare_server_args(command[3:]))
    vocabulary = Vocabulary.of(path)

    def ask(asked: list[Prompt]) -> int:
        bodies = [sglang.request(prompt, sampling, vocabulary) for prompt in asked]
        answers = engine.generate(
            input_ids=[body["input_ids"] for body in bodies],
            image_data=[body["image_data"][0] for body in bodies],
            sampling_params=[body["sampling_params"] for body in bodies],
            return_logprob=True,
        )
        return sum(answer["meta_info"]["completion_tokens"] for answer in answers)

    out.write_text(json.dumps(timed(ask, work)))
    engine.shutdown()


def timed(ask: Callable[[list[Prompt]], int], work: list[list[Prompt]]) -> dict[str, float]:
    """Tokens, seconds and tokens a second of all batches but the first, which warms up."""
    ask(work[0])
    started = time.perf_counter()
    tokens = sum(ask(batch) for batch in work[1:])
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of tests.gpu.served_models")
    parser.add_argument("--preset", choices=presets.PRESETS, default="qwen3-vl-4b")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--text", type=int, default=256, help="tokens of a prompt's text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a response")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--offline", type=Path, help="(internal) the model that this process runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.offline or true_shape(
            options.preset, options.directory / "tiny", Path(folder)
        )
        counts = [8] + [options.prompts] * options.batches
        work = [prompts(path, n, options.text, seed) for seed, n in enumerate(counts)]
        sampling = Sampling(n=options.samples, max_new_tokens=options.length)
        if options.offline:
            offline(path, work, sampling, options.out)
            return
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        report: dict[str, Any] = {"model": options.preset, "gpus": 1}
        report |= {key: getattr(options, key) for key in ("prompts", "samples", "text", "length")}
        log = options.out.with_suffix(".server.log")
        report["server"] = server(path, work, sampling, log, gpu)
        print(report, flush=True)
        _, environment = sglang.server_command(path, host="", port=31800, api_key="")
        result = Path(folder) / "offline.json"
        command = [sys.executable, "-m", "tests.gpu.check_rollouts", *sys.argv[1:]]
        subprocess.run(
            [*command, "--offline", str(path), "--out", str(result)],
            check=True,
            env=outside_of_ranks() | environment | {"CUDA_VISIBLE_DEVICES": gpu},
        )
        report["offline"] = json.loads(result.read_text())
    report["ratio"] = report["server"]["tokens_per_s"] / report["offline"]["tokens_per_s"]
    report |= workload.environment(backends.create("cuda"))
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
