r"""A training checkpoint on GPUs: three steps, save, three more against load and three more.

It is written in the background, beside the steps that follow, of which it must have nothing.

    torchrun --nproc-per-node N -m tests.gpu.check_resume [--tensor T --expert E] \
        [--moments bfloat16] [--offload] --out FILE

Dense language model, and a Mixture-of-Experts discriminator whose fp32 head stands among BF16
weights. Kernels add in no fixed order, so losses may differ in the last bits (TOLERANCE); a model
that gets its weights back and not its moments is ten times as far off, which shows that the
comparison sees a loss of state. With --offload the optimizer's state comes to the device in many
pieces, and three steps without offload must give the same losses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint_tools import megatron_directory
from model_providers import backend as backends
from model_providers.parallel import Layout
from prism_megatron.bench import workload
from prism_megatron.training import host_state
from tests.gpu import check_cuda_backend as check

TOLERANCE = 2e-3


def resumed(
    backend: Any, layout: Layout, folder: Path, head: Any, **optimizer: Any
) -> dict[str, Any]:
    loss = check.loss_of(head)

    def train(runner: Any) -> list[float]:
        return [runner.train_step(check.batch(), loss).sums["loss"] for _ in range(3)]

    first = check.build(backend, layout, folder, head, **optimizer)
    before = train(first)
    hf = folder / f"hf-{head}"
    if dist.get_rank() == 0:
        hf.mkdir(exist_ok=True)
        (hf / "config.json").write_text(json.dumps(check.raw_config(head == "score")))
    dist.barrier()
    path = folder / f"checkpoint-{head}"
    saving = first.begin_save(path, hf, in_background=True)
    undisturbed = train(first)
    saving.finish()
    plain = check.build(backend, layout, folder, head, **optimizer | {"offload": False})
    second = check.build(backend, layout, folder, head, **optimizer)
    second.load(path)
    third = check.build(backend, layout, folder, head)
    megatron_directory.load(path, third.model)
    third.optimizer.reload_model_params()
    return {
        "before": before,
        "on_device": train(plain),
        "undisturbed": undisturbed,
        "resumed": train(second),
        "weights_alone": train(third),
    }


def distance(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--moments", default="float32")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    backend = backends.create(options.backend)
    backend.init_process_group()
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    optimizer = {"moments": options.moments, "offload": options.offload, "betas": (0.9, 0.99)}
    host_state.PIECE = 2**14
    result: dict[str, Any] = {"tensor": options.tensor, "expert": options.expert} | optimizer
    for head in ("language", "score"):
        layout = Layout(
            tensor=options.tensor,
            expert=options.expert if head == "score" else 1,
            sequence_parallel=options.tensor > 1,
        )
        result[head] = resumed(backend, layout, Path(box[0]), head, **optimizer)
    result["world"] = dist.get_world_size()
    if dist.get_rank() == 0:
        if torch.accelerator.is_available():
            result |= workload.environment(backends.create("cuda"))
        print(json.dumps(result, indent=2))
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, found in result.items():
        if isinstance(found, dict) and "resumed" in found:
            assert distance(found["resumed"], found["undisturbed"]) < TOLERANCE, (name, found)
            assert distance(found["on_device"], found["before"]) < TOLERANCE, (name, found)
            lost = distance(found["weights_alone"], found["undisturbed"])
            assert lost > 10 * TOLERANCE, (name, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
