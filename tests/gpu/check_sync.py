"""Weight sync into SGLang or vLLM servers, and what they sample then.

    torchrun --nproc-per-node N -m tests.gpu.check_sync DIR --out FILE [--engine vllm]
        [--preset NAME] [--apart ENGINES] [--hosts H] [--quantization fp8-block] [layout]

Servers are on the trainers' GPUs, or with --apart that many on the GPUs after them; where ranks
share GPUs (tests.gpu.shared_gpu) those share them, too, and are sent to over NCCL all the same.
With --hosts the ranks exchange weights as on that many hosts.

With a kind of DIR (tests.gpu.served_models): the server loads the export from disk, its tensors are
kept, scrambled and synced from Megatron, and must be the same again. Then it samples responses to
prompts with images, whose log-probabilities Megatron recomputes, of a Mixture of Experts by its own
choice of experts and by the engine's; the same once more with other weights, the vision tower's
too, and the same images. With --apart the last server is killed before that and started again,
twice: the sync is done anew, and no group and no memory of the old ones may be left on rank 0.

With --preset NAME, of true shape and random weights: seconds of a sync by phase.

With --quantization syncs quantise. The server loads what checkpoint_tools.quantize made of the
export, so that the comparison is one with the offline quantiser, whose bits the sync's are also set
against before. How far log-probabilities are apart is then written and not judged: it is what FP8
costs these random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import torch.distributed as dist

from checkpoint_tools import hf_writer
from checkpoint_tools.hf_directory import HFDirectory, SafetensorsDirectory
from checkpoint_tools.weights import unequal
from model_providers import backend as backends
from model_providers import presets
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from model_providers.weight_plan import WeightPlan
from prism_megatron.bench import workload
from prism_megatron.config import schema
from prism_megatron.config.schema import Sampling
from prism_megatron.pipelines.sync_check import distances
from prism_megatron.rollout import guard, sglang, vllm
from prism_megatron.rollout.quantized import served_directory
from prism_megatron.rollout.server import outside_of_ranks
from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.rollout.weight_sync import BroadcastSync, IpcSync
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import Prompt, Rollout
from tests.gpu.served_models import questions

PROGRAMS: dict[str, tuple[Any, Any]] = {
    "sglang": (sglang.server_command, sglang.SGLangEngine),
    "vllm": (vllm.server_command, vllm.VLLMEngine),
}
# Room for 65,536 tokens and more of the largest model here, whatever else the GPU holds.
OPTIONS = {
    # without FlashAttention-3's and FlashInfer's binaries
    "sglang": "--attention-backend triton --sampling-backend pytorch --grammar-backend none "
    "--mm-attention-backend sdpa --disable-cuda-graph --max-running-requests 256 "
    "--max-total-tokens 65536 --mem-fraction-static 0.9",
    "vllm": "--enforce-eager --dtype bfloat16 --max-model-len 2048 --moe-backend triton "
    "--skip-mm-profiling --kv-cache-memory-bytes 10000000000 --gpu-memory-utilization 0.1",
}
GROUP_MIB = 50
"""Less than NCCL's buffers of a group."""
Engine = sglang.SGLangEngine | vllm.VLLMEngine
Sync = Callable[[int], dict[str, float]]
CLOSE = {"dense": 0.01, "moe": 0.03}
"""Mean distance of log-probabilities in BF16, which sends some tokens of a random Mixture of
Experts to other experts."""


class ServerProcess:
    """A server on some of this host's GPUs, for as long as the block lasts."""

    def __init__(
        self,
        kind: str,
        path: Path,
        gpus: list[str],
        options: list[str],
        log: Path,
        port: int,
        *,
        routes: bool = False,
    ) -> None:
        """ENGINE_PYTHONPATH: packages of the server, where they are not the trainer's."""
        make_command, client = PROGRAMS[kind]
        command, environment = make_command(
            path,
            host="127.0.0.1",
            port=port,
            api_key="key",
            tensor=len(gpus),
            options=options,
            routes=routes,
        )
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        # which would compile kernels first, or at each new size, for minutes
        environment |= {"VLLM_USE_DEEP_GEMM": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        environment |= {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
        # see tests.gpu.shared_gpu
        if "NCCL_HOSTID" in os.environ:
            environment |= {"NCCL_HOSTID": f"server-{port}"}
        if packages := os.environ.get("ENGINE_PYTHONPATH"):
            environment["PYTHONPATH"] = packages
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                # which ends it also if this rank is killed
                [sys.executable, "-P", guard.__file__, *command],
                env=outside_of_ranks() | environment,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
            )
        self.engine = client(f"http://127.0.0.1:{port}", "key", Vocabulary.of(path))

    def wait(self, seconds: float) -> float:
        """Seconds until it answered."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if self.process.poll() is not None:
                break
            try:
                asyncio.run(self.engine.health())
                return time.monotonic() - started
            except (httpx.HTTPError, RuntimeError):
                time.sleep(0.5)
        raise RuntimeError(f"the server did not come up: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """By SIGKILL, as a server dies."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for child in psutil.Process(self.process.pid).children():
                os.killpg(child.pid, signal.SIGKILL)
        self.process.wait()


async def sample(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> list[list[Rollout]]:
    answers = await asyncio.gather(*(engine.generate(p, sampling, "") for p in prompts))
    await engine.close()
    return list(answers)


def true_shape(name: str, processor: Path, target: Path) -> Path:
    """A directory without weights: a preset's config, token ids and processor of a tiny model."""
    hf_writer.copy_config(processor, target)
    tiny = json.loads((processor / "config.json").read_text())
    raw = hf_writer.in_dialect(presets.hf_config(name), "4.57")
    raw |= {key: value for key, value in tiny.items() if key.endswith("_token_id")}
    (target / "config.json").write_text(json.dumps(raw))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--engine", choices=sorted(PROGRAMS), default="sglang")
    parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
    parser.add_argument("--preset", choices=presets.PRESETS)
    parser.add_argument("--quantization", choices=("fp8-block",))
    for name in ("tensor", "pipeline", "expert", "expert-tensor", "engine-tensor"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--apart", type=int, default=0, help="engines on GPUs of their own")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--port", type=int, default=31000, help="of the first server")
    parser.add_argument("--bucket-mib", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    backend = backends.create("cuda")
    backend.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    if options.hosts > 1:
        name = f"host-{rank * options.hosts // world}"
        socket.gethostname = lambda: name
    layout = Layout(
        tensor=options.tensor,
        pipeline=options.pipeline,
        expert=options.expert,
        expert_tensor=options.expert_tensor,
        sequence_parallel=options.tensor > 1,
    )
    parallel = ParallelState.create(layout)
    backend.seed(1, parallel)
    folder = Path(tempfile.mkdtemp())
    quantization = options.quantization
    export, processor = options.directory / options.kind, options.directory / "tiny"
    if options.preset:
        path = true_shape(options.preset, processor, folder)
    else:
        form = quantization or "bf16"
        path = Path(shutil.copytree(export / form, folder, dirs_exist_ok=True))
        shutil.copy(processor / "generation_config.json", path)

    def build() -> Qwen3VLModel:
        with torch.device(backend.device):
            built = Qwen3VLModel(Qwen3VLConfig.from_hf(path), parallel, backend).to(backend.device)
        if options.preset:
            workload.randomise(built)
        else:
            load_hf_weights(built, HFDirectory(export / "bf16"), str(export))
        return built

    # servers start while it is made, unless their directory says what of it is quantised
    model = build() if quantization else None
    if model is not None:
        box = [path]
        dist.broadcast_object_list(box, src=0)
        numbers = tuple(range(options.engine_tensor))
        rollout = schema.Rollout(
            kind=options.engine, tensor=len(numbers), gpus=numbers, quantization=quantization
        )
        path = served_directory(rollout, model, box[0], box[0] / "served")
    size = options.engine_tensor
    local, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    places: list[Any] = [None] * world
    dist.all_gather_object(places, gpus[local])
    # of each engine its GPUs, and of trainers the ranks that have them, the first of which talks
    used = list(dict.fromkeys(places))
    free = used
    if options.apart:
        free = gpus[world:] if len(gpus) - world >= size else gpus
    count = options.apart or len(used) // size
    on = {i: [free[(i * size + j) % len(free)] for j in range(size)] for i in range(count)}
    groups = {i: [0] if options.apart else [places.index(g) for g in on[i]] for i in on}
    flags = OPTIONS[options.engine].split()
    vocabulary = Vocabulary.of(path)
    client = PROGRAMS[options.engine][1]
    servers = {
        i: client(f"http://127.0.0.1:{options.port + 50 * i}", "key", vocabulary) for i in groups
    }
    engine = servers[0]

    def start(i: int) -> ServerProcess:
        return ServerProcess(
            options.engine,
            path,
            on[i],
            flags,
            options.out.with_suffix(f".server{i}.log"),
            options.port + 50 * i,
            routes=options.kind == "moe",
        )

    mine = [start(i) for i in groups if groups[i][0] == rank]
    report: dict[str, Any] = {"model": options.preset or options.kind, "world": world}
    report |= {"engine": options.engine, "engines": count, "apart": bool(options.apart)}
    report |= {"layout": {k: v for k, v in vars(layout).items() if isinstance(v, int)}}
    report |= {"engine_tensor": size, "bucket_mib": options.bucket_mib}
    report |= {"quantization": quantization, "hosts": options.hosts}
    report |= {"gpus": len({*used, *chain(*on.values())})}
    try:
        model = model or build()
        for server in mine:
            report["server_start_s"] = server.wait(240)
        dist.barrier()
        cut = {"bucket_bytes": options.bucket_mib * 2**20, "quantization": quantization}
        weights: BroadcastSync | IpcSync
        if options.apart:
            weights = BroadcastSync(model, size, **cut)
        else:
            weights = IpcSync(model, groups, **cut)

        def sync(version: int) -> dict[str, float]:
            return weights.sync(servers, version)

        report["buckets"] = len(weights.plan.buckets)
        report["gib"] = sum(bucket.nbytes for bucket in weights.plan.buckets) / 2**30
        if quantization and not options.preset:
            _bits(weights.plan, export / quantization)
            report["equal_to_offline"] = True
        _equality(report, sync, [server.engine for server in mine], options.preset)
        _times(report, sync, options.cycles)
        if isinstance(weights, BroadcastSync) and not options.preset:
            restarted: list[dict[str, Any]] = [{} for _ in range(2)]
            for found in restarted:
                if rank == 0:
                    mine[-1].stop()
                    mine[-1] = start(count - 1)
                    mine[-1].wait(240)
                    servers[count - 1] = mine[-1].engine
                _equality(found, sync, [server.engine for server in mine], None)
                found["groups"] = len(dist.distributed_c10d._world.pg_map)
                found["rank_0_mib"] = _used_mib()
            report["restarted"] = restarted
            assert len({found["groups"] for found in restarted}) == 1, restarted
            grown = restarted[1]["rank_0_mib"] - restarted[0]["rank_0_mib"]
            assert grown < GROUP_MIB, restarted
        if not options.preset:
            _logprobs(report, sync, engine, model, options.directory)
        if isinstance(weights, BroadcastSync):
            weights.leave()
        # which is about memory that a trainer shares
        elif rank == 0:
            _write(report, options.out)
            _sleep(report, engine)
    finally:
        for server in mine:
            server.stop()
        shutil.rmtree(folder)
    if rank == 0:
        _write(report, options.out)
        print(options.out.read_text())
    # the others' memory is what rank 0 gathered from
    dist.barrier()
    dist.destroy_process_group()


def _used_mib() -> float:
    """What this process holds of its GPU, outside of torch's allocator too."""
    listed = torch.cuda.list_gpu_processes()
    own = re.search(rf"process\s+{os.getpid()} uses\s+([\d.]+) MB", listed)
    assert own, listed
    return float(own[1]) - torch.cuda.memory_reserved() / 2**20


def _write(report: dict[str, Any], out: Path) -> None:
    """What is known so far."""
    out.write_text(
        json.dumps(report | workload.environment(backends.create("cuda")), indent=2) + "\n"
    )


def _bits(plan: WeightPlan, offline: Path) -> None:
    """AssertionError unless what this device rounds is what the CPU rounded for the checkpoint."""
    written = SafetensorsDirectory(offline)
    wrong = [
        name
        for name, tensor in plan.weights()
        if unequal(tensor.cpu().to(written.like(name).dtype), written[name])
    ]
    assert not wrong, f"{len(wrong)} tensors are not the offline quantiser's: {wrong[:5]}"


def _equality(
    report: dict[str, Any], sync: Sync, engines: Sequence[Engine], preset: str | None
) -> None:
    """What is loaded from disk, or by a first sync, comes back after the tensors are scrambled."""
    if preset:
        report["first_sync"] = sync(0)
    for engine in engines:
        asyncio.run(engine.check("snapshot"))
        asyncio.run(engine.check("reset_tensors"))
        try:
            asyncio.run(engine.check("compare"))
        except RuntimeError as error:
            report["scrambled"] = str(error)[:200]
        else:
            raise AssertionError("the scrambled weights compare as equal")
    seconds = sync(1)
    report.setdefault("first_sync", seconds)
    for engine in engines:
        asyncio.run(engine.check("compare"))
    report["equal_after_sync"] = True


def _times(report: dict[str, Any], sync: Sync, cycles: int) -> None:
    runs = [sync(2 + number) for number in range(cycles)]
    report["sync_s"] = {
        phase: statistics.median(run.get(phase, 0.0) for run in runs) for phase in runs[0]
    }
    report["sync_total_s"] = [run["total"] for run in runs]


def _logprobs(
    report: dict[str, Any],
    sync: Sync,
    engine: Engine,
    model: Qwen3VLModel,
    directory: Path,
) -> None:
    """Of sampled responses, before and after a sync of other weights, with the same images."""
    runner = ModelRunner(model, micro_batch_tokens=4096, pad_id=0, optimizer=None)
    prompts = []
    for number, (_, sequence) in enumerate(questions(directory)):
        split = int((~sequence.response_mask).sum())
        ids = tuple(sequence.input_ids[:split].tolist())
        prompts.append(Prompt(str(number), ids, sequence.images))
    suppressed = asyncio.run(sample(engine, prompts[:4], Sampling(n=16, max_new_tokens=64)))
    placeholders = set(engine.vocabulary.forbidden)
    seen = {token for group in suppressed for r in group for token in r.ids}
    assert seen and not seen & placeholders, "a placeholder was sampled"
    # A random model gives them a hundredth of the probability, which suppressing them would shift
    # to the other tokens; so they may be sampled here, and responses that hold one are left out.
    free = replace(engine.vocabulary, forbidden=())
    engine = type(engine)(engine.url, "key", free, routes=report["model"] == "moe")
    sampling = Sampling(n=32, max_new_tokens=64)
    for moment in ("before", "after"):
        if moment == "after":
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
                        noise = torch.randn(
                            parameter.shape, generator=generator, device=parameter.device
                        )
                        parameter.add_(0.02 * noise.to(parameter.dtype))
            report["sync_of_other_weights"] = sync(1000)
        started = time.perf_counter()
        answers = asyncio.run(sample(engine, prompts, sampling)) if dist.get_rank() == 0 else []
        seconds = time.perf_counter() - started
        tokens = sum(len(r.ids) for group in answers for r in group)
        box: list[Any] = [
            [[r for r in group if not placeholders & set(r.ids)] for group in answers]
        ]
        dist.broadcast_object_list(box, src=0)
        samples = [(p, r) for p, group in zip(prompts, box[0], strict=True) for r in group]
        if report["model"] == "moe":
            report[f"logprobs_{moment}_with_engines_experts"] = distances(runner, samples)
        found = distances(runner, [(p, replace(r, routes=None)) for p, r in samples])
        report[f"logprobs_{moment}"] = found | {"tokens_per_s": tokens / seconds}
        if report["quantization"] is None:
            assert found["mean_distance"] <= CLOSE[report["model"]], report


def _sleep(report: dict[str, Any], engine: Engine) -> None:
    """Twenty naps: what is left on the GPU, and whether that grows."""
    free, times = [], []
    for _ in range(20):
        started = time.perf_counter()
        asyncio.run(engine.sleep())
        slept = time.perf_counter()
        free.append(torch.accelerator.get_memory_info()[0])
        asyncio.run(engine.wake("weights"))
        asyncio.run(engine.wake("kv_cache"))
        times.append((slept - started, time.perf_counter() - slept))
    report["sleep"] = {
        "free_asleep_gib": free[0] / 2**30,
        "drift_mib": (free[0] - free[-1]) / 2**20,
        "sleep_s": statistics.median(t[0] for t in times),
        "wake_s": statistics.median(t[1] for t in times),
        "free_awake_gib": torch.accelerator.get_memory_info()[0] / 2**30,
    }


if __name__ == "__main__":
    main()
