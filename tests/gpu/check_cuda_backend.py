r"""The CUDA backend against the CPU backend: the same weights and batch, loss and gradients.

    # anywhere: model, loss, gradients
    python -m tests.gpu.check_cuda_backend reference DIR [--tied]
    torchrun --nproc-per-node N -m tests.gpu.check_cuda_backend compare DIR [--tied] --tensor T \
        --expert E --context C --pipeline P --virtual-pipeline V --vision replicated

BF16 with Transformer Engine can't equal fp32 to the last bit: what is asked is that every gradient
points where the fp32 one points (cosine above 0.98), as long as it (within 6 percent), and that ten
optimizer steps lower the loss; with --tied, after which all ranks still have one embedding, those
of a pipeline's last stage too. The experts' tokens are those that fp32 chose, replayed: where two
experts are nearly as good, a last bit decides, and tokens that go elsewhere move the loss by as
much as all rounding does. How many would, and the loss then, are told besides. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout, ParallelState
from model_providers.qwen3_vl import Head, Qwen3VLModel
from model_providers.weight_map import load_hf_weights
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer
from prism_megatron.training.runner import ModelRunner
from prism_megatron.types import PackedBatch, Sequence, VisualInputs

IMAGE, VOCAB = 500, 512
SIZES = ("tensor", "expert", "expert_tensor", "context", "pipeline", "virtual_pipeline")
VISION = dict(
    depth=3,
    hidden_size=288,
    intermediate_size=608,
    num_heads=4,
    out_hidden_size=256,
    patch_size=16,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1, 2],
    in_channels=3,
    hidden_act="gelu_pytorch_tanh",
)
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    rope_parameters=dict(rope_theta=5e6, mrope_section=[12, 10, 10]),
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=384)


def raw_config(moe: bool, tied: bool = False) -> dict[str, Any]:
    return dict(
        model_type="qwen3_vl_moe" if moe else "qwen3_vl",
        text_config=TEXT | (EXPERTS if moe else {}),
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=501,
        tie_word_embeddings=tied,
    )


def batch() -> list[Sequence]:
    """Twenty-four sequences; images of three sizes, most shared, text only between them."""
    generator = torch.Generator().manual_seed(3)
    images = {
        key: VisualInputs(key, torch.randn(h * w, 1536, generator=generator), (1, h, w))
        for key, h, w in (("wide", 4, 12), ("tall", 16, 6), ("small", 4, 4))
    }
    shown = 4 * [["wide"], [], ["tall", "small"], ["wide"], [], ["small"]]
    sequences = []
    for number, keys in enumerate(shown):
        ids = [7]
        for key in keys:
            ids += [IMAGE] * (len(images[key].pixel_values) // 4) + [8]
        text = 60 + 9 * (number % 7)
        ids += torch.randint(10, 490, (text,), generator=generator).tolist()
        mask = torch.arange(len(ids)) >= len(ids) - text // 2
        sequences.append(Sequence(torch.tensor(ids), tuple(images[k] for k in keys), mask))
    return sequences


def loss_of(head: Head) -> Any:
    sequences = batch()
    tokens = float(sum(s.response_mask.sum() for s in sequences))

    def language(output: Tensor, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value = -(output * packed.loss_mask).sum() / tokens
        return value, {"loss": value.detach()}

    def score(output: Tensor, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        # of all these tokens, among which the rounding of single scores averages out
        value = ((output - 3.0).square() * packed.loss_mask).sum() / tokens
        return value, {"loss": value.detach()}

    return language if head == "language" else score


def build(
    backend: Any,
    layout: Layout,
    directory: Path,
    head: Head,
    tied: bool = False,
    **optimizer: Any,
) -> ModelRunner:
    parallel = ParallelState.create(layout)
    backend.seed(1, parallel)
    kind = "moe" if head == "score" else "dense"
    config = Qwen3VLConfig.from_dict(raw_config(head == "score", tied), kind)
    model = Qwen3VLModel(config, parallel, backend, head).to(backend.device)
    file = directory / f"{kind}.safetensors"
    if not file.exists():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.normal_(around, 0.05)
        save_file({n: t.clone() for n, t in iter_hf_weights(model)}, file)
    load_hf_weights(model, load_file(file), str(file))
    settings = Optimizer(lr=3e-4, **optimizer)
    return ModelRunner(model, micro_batch_tokens=512, pad_id=0, optimizer=settings, steps=10)


def chosen(runner: ModelRunner) -> list[Tensor]:
    """The experts that each sequence's tokens take by themselves, [L, layers, k] of this stage."""

    def nothing(output: Tensor, packed: PackedBatch) -> list[Tensor]:
        return packed.num_sequences * [torch.zeros(1)]

    return runner.infer_with_routes(batch(), nothing)[1]


def gradients(
    runner: ModelRunner, head: Head, sequences: list[Sequence]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient under its Hugging Face name, fp32 on the CPU."""
    finalize = runner.model.config.finalize_model_grads_func
    runner.model.config.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize(
        models, tokens, **(kwargs | {"force_all_reduce": True})
    )
    runner.model.train()
    for chunk in runner.ddp:
        chunk.force_all_reduce = True
        chunk.zero_grad_buffer()
    sums = runner.forward_backward(sequences, loss_of(head))
    grads = {
        name: tensor.float().cpu().clone()
        for name, tensor in iter_hf_weights(runner.model, read=lambda p: p.main_grad.to(p.dtype))
    }
    runner.model.config.finalize_model_grads_func = finalize
    for chunk in runner.ddp:
        chunk.force_all_reduce = False
    return sums["loss"], grads


def embeddings(runner: ModelRunner) -> list[Tensor]:
    """Every copy of every rank's part of the embedding, gathered on all ranks."""
    held = [
        chunk.language_model.embedding.word_embeddings.weight.detach().float().cpu()
        for chunk in runner.model.chunks
        if hasattr(chunk.language_model, "embedding")
    ]
    box: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, held)
    return [copy for copies in box for copy in copies]


def reference(directory: Path, tied: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    backend = backends.create("cpu")
    backend.init_process_group()
    for head in ("language", "score"):
        runner = build(backend, Layout(), directory, head, tied)
        loss, grads = gradients(runner, head, batch())
        save_file(grads, directory / f"{head}_grads.safetensors")
        if head == "score":
            routes = {str(number): taken for number, taken in enumerate(chosen(runner))}
            save_file(routes, directory / "routes.safetensors")
        (directory / f"{head}.json").write_text(json.dumps({"loss": loss}))
        print(head, "loss", loss, "gradients", len(grads))


def compare(directory: Path, sizes: dict[str, Any], tied: bool) -> dict[str, Any]:
    backend = backends.create("cuda")
    backend.init_process_group()
    result: dict[str, Any] = sizes | {"tied": tied}
    for head in ("language", "score"):
        layout = Layout(**sizes, sequence_parallel=sizes["tensor"] > 1)
        if head == "language":
            # the dense model has no experts
            layout = replace(layout, expert=1, expert_tensor=1)
        runner = build(backend, layout, directory, head, tied)
        sequences = batch()
        own: dict[str, float] = {}
        if head == "score":
            saved = load_file(directory / "routes.safetensors")
            routes = [saved[str(i)][:, runner.model.expert_layers] for i in range(len(sequences))]
            differ = [
                (mine.sort(-1).values != fp32.sort(-1).values).any(-1).float()
                for mine, fp32 in zip(chosen(runner), routes, strict=True)
            ]
            own = {
                "rerouted": float(torch.cat(differ).mean()),
                "loss": gradients(runner, head, sequences)[0],
            }
            sequences = [
                replace(sequence, routes=taken)
                for sequence, taken in zip(sequences, routes, strict=True)
            ]
        loss, grads = gradients(runner, head, sequences)
        expected = load_file(directory / f"{head}_grads.safetensors")
        assert set(grads) == set(expected)
        cosine, length = {}, {}
        for name, exact in expected.items():
            a, b = grads[name].flatten().double(), exact.flatten().double()
            cosine[name] = float(a @ b / (a.norm() * b.norm() + 1e-300))
            length[name] = float(a.norm() / (b.norm() + 1e-300))
        started = time.monotonic()
        losses = [runner.train_step(batch(), loss_of(head)).sums["loss"] for _ in range(10)]
        torch.accelerator.synchronize()
        worst = min(cosine, key=cosine.__getitem__)
        result[head] = {
            "loss": loss,
            "loss_fp32": json.loads((directory / f"{head}.json").read_text())["loss"],
            "own_experts": own,
            "parameters": len(grads),
            "grad_norm": float(torch.stack([g.norm() for g in grads.values()]).norm()),
            "worst_cosine": [worst, cosine[worst]],
            "length_ratio": [min(length.values()), max(length.values())],
            "training_losses": losses,
            "ten_steps_s": time.monotonic() - started,
        }
        if tied and head == "language":
            first, *others = embeddings(runner)
            gaps = [float((first - other).abs().max()) for other in others]
            result["embeddings"] = {"copies": 1 + len(gaps), "largest_gap": max(gaps, default=0.0)}
    return result


def check(result: dict[str, Any]) -> None:
    if result["tied"]:
        assert result["embeddings"]["largest_gap"] == 0.0, result["embeddings"]
    for head in ("language", "score"):
        part = result[head]
        assert abs(part["loss"] / part["loss_fp32"] - 1) < 0.02, part
        assert part["worst_cosine"][1] > 0.98, part
        assert 0.94 < part["length_ratio"][0] and part["length_ratio"][1] < 1.06, part
        assert part["training_losses"][-1] < part["training_losses"][0], part


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("reference", "compare"))
    parser.add_argument("directory", type=Path)
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=1)
    parser.add_argument("--vision", choices=("sharded", "replicated"), default="sharded")
    parser.add_argument("--tied", action="store_true", help="the dense model's embedding and head")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "reference":
        reference(options.directory, options.tied)
        return
    if options.tied and options.tensor > 1:
        parser.error("--tied compares whole embeddings: --tensor 1")
    sizes = {size: getattr(options, size) for size in (*SIZES, "vision")}
    result = compare(options.directory, sizes, options.tied)
    names = ("torch", "megatron-core", "transformer-engine")
    result["versions"] = {name: importlib.metadata.version(name) for name in names}
    result["device"] = torch.cuda.get_device_name()
    result["world"] = torch.distributed.get_world_size()
    gpus: list[Any] = [None] * result["world"]
    torch.distributed.all_gather_object(gpus, str(torch.cuda.get_device_properties().uuid))
    result["gpus"] = len(set(gpus))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(result, indent=2))
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    check(result)


if __name__ == "__main__":
    main()
