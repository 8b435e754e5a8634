"""Turn a dense Qwen3-VL into a discriminator: a Mixture of Experts with a value head.

    python -m checkpoint_tools.upcycle --hf runs/sft/hf --out runs/discriminator --num-experts 4

    architecture  experts                                        value heads
    shared        any token may take any                         one (the reference's)
    dedicated     half for perception, half for reasoning        one for each (the paper's)
    dense         none, the MLP stays                            one (an ablation)

config.json says which under "prism_discriminator", and whoever loads the model reads it there.

Every expert is the dense MLP plus noise; the router's weights for a token sum to one, so without
noise the discriminator computes what the dense model computed. As in the reference
(moe/create_vl_moe.py) the noise is absolute; unlike there, it is seeded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig

from checkpoint_tools import hf_directory
from checkpoint_tools.hf_directory import HFDirectory
from model_providers.config import Qwen3VLConfig, check_dedicated

ARCHITECTURES = ("shared", "dedicated", "dense")
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def upcycle(
    hf: Path,
    out: Path,
    num_experts: int,
    top_k: int,
    noise_std: float,
    router_std: float,
    seed: int,
    architecture: str = "shared",
) -> None:
    """Write `out`, a discriminator of that architecture, from the dense `hf`.

    noise_std: standard deviation added to every expert weight; router_std: of the router's and the
    heads' initial weights. `dense` reads neither noise nor number of experts.
    """
    source = HFDirectory(hf)
    if source.config.num_experts:
        raise ValueError(f"{hf} has experts already; upcycling starts from a dense model")
    if top_k > num_experts:
        raise ValueError(f"top_k={top_k} of num_experts={num_experts} experts; lower top_k")
    if architecture == "dedicated":
        check_dedicated(num_experts, top_k, "upcycle")
    marked = source.raw_config | {"prism_discriminator": {"architecture": architecture}}
    staging = out.with_name(f".{out.name}.config")
    hf_directory.copy_config(hf, staging)
    if architecture == "dense":
        (staging / "config.json").write_text(json.dumps(marked, indent=2))
    else:
        _moe_config(marked, num_experts, top_k).save_pretrained(staging)
    config = Qwen3VLConfig.from_hf(staging)
    tensors = _tensors(source, config, noise_std, router_std, seed)
    hf_directory.write(out, tensors, staging, writer=True)
    for file in staging.iterdir():
        file.unlink()
    staging.rmdir()


def _moe_config(raw: dict[str, Any], num_experts: int, top_k: int) -> Qwen3VLMoeConfig:
    text = {k: v for k, v in raw["text_config"].items() if k not in ("model_type", "dtype")}
    vision = {k: v for k, v in raw["vision_config"].items() if k not in ("model_type", "dtype")}
    text |= dict(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=text["intermediate_size"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )
    keep = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        dtype=raw.get("dtype"),
        architectures=["Qwen3VLMoeForConditionalGeneration"],
        **{key: raw[key] for key in keep},
        prism_discriminator=raw["prism_discriminator"],
    )


def _tensors(
    source: HFDirectory, config: Qwen3VLConfig, noise_std: float, router_std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        shape = (config.num_experts, *tensor.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return (tensor.float() + noise_std * noise).to(tensor.dtype)

    def normal(*shape: int) -> Tensor:
        return router_std * torch.randn(*shape, generator=generator)

    for name in source:
        if not (config.num_experts and name.endswith(MLP)):
            yield name, source[name]
    for layer in range(config.num_layers if config.num_experts else 0):
        prefix = f"model.language_model.layers.{layer}."
        gate, up, down = (source[prefix + part] for part in MLP)
        yield prefix + "mlp.experts.gate_up_proj", noisy(torch.cat([gate, up]))
        yield prefix + "mlp.experts.down_proj", noisy(down)
        yield (
            prefix + "mlp.gate.weight",
            normal(config.num_experts, config.hidden_size).to(gate.dtype),
        )
    for name in config.value_heads:
        yield name, normal(1, config.hidden_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="dense Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--architecture", default="shared", choices=ARCHITECTURES)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--noise-std", type=float, default=0.01)
    parser.add_argument("--router-std", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(argv)
    upcycle(**vars(options))
    print(json.dumps({"out": str(options.out), "architecture": options.architecture}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
