"""A discriminator as the reference releases it: the layout that its value_head.py writes.

config.json                       transformers 4.57's dialect, no word of the architecture
model-0000N-of-0000M.safetensors  BF16, experts as [experts, hidden, 2 * ffn] and
                                  [experts, ffn, hidden], and v_head.1.weight, the Linear of
                                  Sequential(Dropout, Linear without bias)
value_head.pt                     the same head as v_head.summary.weight
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools import hf_to_megatron, megatron_directory
from checkpoint_tools.hf_directory import HFDirectory
from model_providers import backend as backends
from model_providers.parallel import Layout
from prism_megatron.training import discriminator
from prism_megatron.training.runner import ModelRunner
from tests import tiny_models
from tests.dist import checks, hf_reference
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]
HEAD = "v_head.1.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The directory, and the scores of transformers 5 on its weights."""
    root = tmp_path_factory.mktemp("released")
    torch.manual_seed(3)
    head = torch.randn(1, tiny_models.TEXT["hidden_size"]).bfloat16()
    modern = tiny_models.build("moe", tied=True).bfloat16()
    modern.save_pretrained(root / "modern")
    model = hf_reference.load(root / "modern")
    with torch.no_grad():
        last = [hf_reference.hidden(model, s)[-1] for s in checks.mixed_batch()]
    out = root / "Qwen3-VL-tiny-4X-Moe"
    out.mkdir()
    raw = json.loads((root / "modern" / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(_dialect_of_4_57(raw), indent=2))
    tensors = load_file(root / "modern" / "model.safetensors") | {HEAD: head}
    # the wrapper saves a state_dict, which lists the tied language head by its own name
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    for name in tensors:
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    _save_shards(out, tensors, 3)
    torch.save({"v_head.summary.weight": head}, out / "value_head.pt")
    return out, torch.stack(last) @ head[0].float()


def _dialect_of_4_57(raw: dict[str, Any]) -> dict[str, Any]:
    text = raw["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {
        "mrope_interleaved": True,
        "mrope_section": rope["mrope_section"],
        "rope_type": "default",
    }
    return raw | {"transformers_version": "4.57.0"}


def _save_shards(out: Path, tensors: dict[str, Tensor], count: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def _without_head(released: Path, out: Path) -> Path:
    """The same directory with the head in value_head.pt alone."""
    shutil.copytree(released, out)
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    tensors.pop(HEAD)
    _save_shards(out, tensors, 2)
    return out


def _scores(path: Path, layout: Layout) -> Tensor:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(1, parallel)
    model = megatron_directory.load_model(path, parallel, backend, "score")
    runner = ModelRunner(model, micro_batch_tokens=64, pad_id=0, optimizer=None)
    return discriminator.score(runner, checks.mixed_batch())


@pytest.mark.parametrize("world, layout", [(1, Layout()), (2, Layout(expert=2))])
def test_a_released_discriminator_scores_as_in_transformers(
    ranks: Worlds, released: tuple[Path, Tensor], world: int, layout: Layout
) -> None:
    path, wanted = released
    for scores in ranks(world).run(_scores, path, layout):
        assert hf_reference.distance(scores, wanted) <= 1e-4


def _convert(path: Path, out: Path, value_head: Path | None) -> str:
    try:
        hf_to_megatron.convert(path, out, value_head)
    except ValueError as error:
        return str(error)
    return "converted"


def test_a_head_in_value_head_pt_is_read_on_request_only(
    ranks: Worlds, released: tuple[Path, Tensor], tmp_path: Path
) -> None:
    path, wanted = released
    bare, out = _without_head(path, tmp_path / "bare"), tmp_path / "ckpt"
    assert ranks(1).run(_convert, bare, out, bare / "value_head.pt") == ["converted"]
    [scores] = ranks(1).run(_scores, out, Layout())
    assert hf_reference.distance(scores, wanted) <= 1e-4
    # weights do not travel with the configuration: this head is outdated after one step
    assert not (out / "hf" / "value_head.pt").exists()
    [message] = ranks(1).run(_load_error, bare)
    assert "1 missing (v_head.1.weight)" in message
    assert ranks(1).run(_convert, path, tmp_path / "both", path / "value_head.pt") == [
        f"v_head.1.weight is in {path / 'value_head.pt'} and in {path}; leave the former out"
    ]


def _load_error(path: Path) -> str:
    try:
        _scores(path, Layout())
    except ValueError as error:
        return str(error)
    return "loaded"


class Payload:
    """What unpickling must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the file ran code')",))


@pytest.mark.parametrize(
    "content, words",
    [
        ({"v_head.summary.weight": Payload()}, "no value_head.pt of plain tensors"),
        ({"v_head.0.weight": torch.zeros(1, 56)}, r"holds \['v_head.0.weight'\], wanted"),
        (torch.zeros(1, 56), "holds Tensor, wanted v_head.summary.weight alone"),
        (None, "no value_head.pt of plain tensors"),
    ],
    ids=["code", "other-name", "tensor", "truncated"],
)
def test_a_value_head_of_another_kind_is_refused(
    released: tuple[Path, Tensor], tmp_path: Path, content: Any, words: str
) -> None:
    file = tmp_path / "value_head.pt"
    torch.save(content, file)
    if content is None:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=words):
        HFDirectory(released[0], file)
