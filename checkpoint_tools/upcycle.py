"""Turn a dense Qwen3-VL into a discriminator: a Mixture of Experts with a value head.

    prism-megatron checkpoint upcycle --hf runs/sft/hf --out runs/discriminator --num-experts 4

    architecture  experts                                        value heads
    shared        any token may take any                         one (the reference's)
    dedicated     half for perception, half for reasoning        one for each (the paper's)
    dense         none, the MLP stays                            one (an ablation)

config.json says which under "prism_discriminator", and whoever loads the model reads it there.

Every expert is the dense MLP plus noise; the router's weights for a token sum to one, so without
noise the discriminator computes what the dense model computed. The noise's standard deviation is
absolute as in the reference (moe/create_vl_moe.py) or a share of each tensor's own; unlike there it
is seeded, by tensor and expert, so it does not depend on who writes what first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig

from checkpoint_tools import hf_writer, hub, world
from checkpoint_tools.command import exit_status
from checkpoint_tools.files import identity, new_folder
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.megatron_weights import head_of, structure_of
from checkpoint_tools.weights import EXPERTS, StoredWeights
from model_providers.architecture import Qwen3VLConfig, check_dedicated

ARCHITECTURES = ("shared", "dedicated", "dense")
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
LAYER = "model.language_model.layers."
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ROUTER = "mlp.gate.weight"
DENSE = {GATE_UP: MLP[:2], DOWN: MLP[2:]}
"""What each fused expert tensor is made of."""


def upcycle(
    hf: Path,
    out: Path,
    num_experts: int,
    top_k: int,
    noise_std: float,
    router_std: float,
    seed: int,
    architecture: str = "shared",
    relative_noise: bool = False,
) -> None:
    """Write `out`, a discriminator of that architecture, from the dense `hf`; all ranks of the
    world call this.

    noise_std: standard deviation added to every expert weight, with relative_noise in units of the
    tensor's own; router_std: of the router's and the heads' initial weights. `dense` reads neither
    noise nor number of experts.
    """
    source = HFDirectory(hf)
    if source.config.num_experts:
        raise ValueError(f"{hf} has experts already; upcycling starts from a dense model")
    if head_of(source) == "score":
        raise ValueError(f"{hf} has a value head already; upcycling starts from a language model")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k={top_k} of num_experts={num_experts} experts; give at least 1, and at most all"
        )
    if architecture == "dedicated":
        check_dedicated(num_experts, top_k, "upcycle")
    marked = source.raw_config | {"prism_discriminator": {"architecture": architecture}}
    job: dict[str, Any] = {
        "from": identity(hf),
        "experts": [architecture, num_experts, top_k],
        "noise": [noise_std, relative_noise, router_std, seed],
    }
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        hf_writer.copy_config(hf, files)
        if architecture == "dense":
            (files / "config.json").write_text(json.dumps(marked, indent=2))
        else:
            _moe_config(marked, num_experts, top_k).save_pretrained(files)
        weights = _Upcycled(source, Qwen3VLConfig.from_hf(files), job["noise"])
        hf_writer.export(out, weights, files, job)


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


class _Upcycled(StoredWeights):
    """The discriminator's weights, made when asked for."""

    def __init__(self, source: HFDirectory, config: Qwen3VLConfig, noise: list[Any]) -> None:
        self.source, self.config = source, config
        self.noise_std, self.is_relative, self.router_std, self.seed = noise
        self.kept = [n for n in source if not (config.num_experts and n.endswith(MLP))]
        layers = range(config.num_layers if config.num_experts else 0)
        self.new = [
            *(f"{LAYER}{layer}.{name}" for layer in layers for name in (*DENSE, ROUTER)),
            *config.value_heads,
        ]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.kept, *self.new])

    def __len__(self) -> int:
        return len(self.kept) + len(self.new)

    def file_of(self, name: str) -> Path:
        return self.source.path

    def like(self, name: str) -> Tensor:
        if name in self.source:
            return self.source.like(name)
        c = self.config
        if name in c.value_heads:
            return torch.empty(1, c.hidden_size, device="meta")
        prefix, key = _layer_and_key(name)
        dtype = self.source.like(prefix + MLP[0]).dtype
        shape: tuple[int, ...] = {
            ROUTER: (c.num_experts, c.hidden_size),
            GATE_UP: (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size),
            DOWN: (c.num_experts, c.hidden_size, c.moe_intermediate_size),
        }[key]
        return torch.empty(shape, dtype=dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        if name in self.source:
            return self.source[name]
        like = self.like(name)
        if name.endswith(EXPERTS):
            return torch.stack([self.expert(name, i) for i in range(like.shape[0])])
        return (self.router_std * self._normal(like, name)).to(like.dtype)

    def expert(self, name: str, index: int) -> Tensor:
        prefix, key = _layer_and_key(name)
        dense = torch.cat([self.source[prefix + part] for part in DENSE[key]]).float()
        std = self.noise_std * (float(dense.std()) if self.is_relative else 1.0)
        return (dense + std * self._normal(dense, f"{name}:{index}")).to(self.like(name).dtype)

    def _normal(self, like: Tensor, name: str) -> Tensor:
        """fp32 noise that belongs to this seed and name."""
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(like.shape, generator=generator)


def _layer_and_key(name: str) -> tuple[str, str]:
    layer, _, key = name.removeprefix(LAYER).partition(".")
    return f"{LAYER}{layer}.", key


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="dense Hugging Face directory or hub id")
    parser.add_argument("--out", type=new_folder, required=True, help="directory to write")
    parser.add_argument("--architecture", default="shared", choices=ARCHITECTURES)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--noise-std", type=float, default=0.01)
    parser.add_argument(
        "--relative-noise", action="store_true", help="in units of each tensor's own deviation"
    )
    parser.add_argument("--router-std", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(argv)
    world.join()
    options.hf = hub.local(options.hf)
    structure_of(HFDirectory(options.hf))
    upcycle(**vars(options))
    if world.rank_and_size()[0] == 0:
        print(f"{options.out}: {options.architecture} discriminator from {options.hf}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
