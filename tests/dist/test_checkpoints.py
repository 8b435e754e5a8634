"""Checkpoints: any layout to any other, training that goes on as if never stopped, conversions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import Qwen3VLForConditionalGeneration

from checkpoint_tools import hf_to_megatron, megatron_directory, megatron_to_hf
from checkpoint_tools.headers import hf_directory
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.inspect import inspect
from checkpoint_tools.reshard import reshard
from checkpoint_tools.torch_dist import TorchDistReader
from checkpoint_tools.upcycle import upcycle
from checkpoint_tools.verify import verify
from model_providers import backend as backends
from model_providers.architecture import Qwen3VLConfig
from model_providers.parallel import Layout
from model_providers.qwen3_vl import Head
from model_providers.weight_plan import iter_hf_weights
from prism_megatron.config.schema import Optimizer
from prism_megatron.training import host_state
from prism_megatron.training.runner import ModelRunner
from tests.dist import checks, hf_reference
from tests.dist.ranks import Ranks
from tests.tiny_models import VOCAB

Worlds = Callable[[int], Ranks]

# an eps that is not lost beside gradients of zero, whose sign differs from layout to layout
ADAM = Optimizer(lr=1e-2, eps=1e-3, warmup_steps=5, weight_decay=0.1)
TP2SP = Layout(tensor=2, sequence_parallel=True)
TP2SP_TOWER = replace(TP2SP, vision="replicated")
TP2EP2 = Layout(tensor=2, expert=2, sequence_parallel=True)
ETP2 = Layout(expert_tensor=2)
CP2EP2 = Layout(context=2, expert=2)
UNEVEN = Layout(pipeline=2, first_stage_layers=1)
VPP2 = Layout(pipeline=2, virtual_pipeline=2)
# eight parts of which the first and the last hold no layer
DEEP = Layout(pipeline=4, virtual_pipeline=2, embedding_as_layer=True, loss_as_layer=True)


def _weights(runner: ModelRunner) -> dict[str, Tensor]:
    """Every weight, on rank 0 only."""
    found = {name: tensor.clone() for name, tensor in iter_hf_weights(runner.model)}
    return found if dist.get_rank() == 0 else {}


def _save(path: Path, layout: Layout, out: Path) -> None:
    runner = checks.make_runner(path, layout)
    megatron_directory.save(out, runner.model, path)


def _differing(path: Path, layout: Layout, ckpt: Path) -> list[str]:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(layout)
    backend.seed(1, parallel)
    model = megatron_directory.load_model(ckpt, parallel, backend)
    source = load_file(path / "model.safetensors")
    loaded = dict(iter_hf_weights(model))
    wrong = [name for name in loaded if not torch.equal(loaded[name], source[name])]
    return wrong + sorted(set(loaded) ^ set(source))


@pytest.mark.parametrize(
    "kind, world, layout",
    [
        ("dense", 2, TP2SP),
        ("dense", 2, TP2SP_TOWER),
        ("moe", 2, TP2EP2),
        ("moe", 2, ETP2),
        ("tied", 2, UNEVEN),
        ("moe", 2, CP2EP2),
    ],
    ids=["dense-tp2", "dense-tp2-tower", "moe-tp2-ep2", "moe-etp2", "tied-uneven", "moe-cp2-ep2"],
)
def test_weights_load_at_every_layout(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, kind: str, world: int, layout: Layout
) -> None:
    ckpt = tmp_path / "ckpt"
    ranks(world).run(_save, hf_models[kind], layout, ckpt)
    others = [(1, Layout()), (2, Layout()), (2, Layout(pipeline=2)), (2, TP2SP), (2, UNEVEN)]
    others += [(2, VPP2), (2, TP2SP_TOWER)]
    if kind == "moe":
        others += [(2, Layout(expert=2)), (2, ETP2), (2, CP2EP2)]
    for size, other in others:
        found = ranks(size).run(_differing, hf_models[kind], other, ckpt)
        assert found == [[]] * size, other


Training = tuple[list[tuple[float, float]], dict[str, Tensor]]


def _train(
    path: Path,
    layout: Layout,
    head: Head,
    steps: int,
    ckpt: Path | None = None,
    dtype: torch.dtype = torch.float32,
    freeze: tuple[str, ...] = (),
    offload: bool = False,
) -> Training:
    """(Loss, gradient norm) of each step and the weights after them. Starts from `ckpt` where there
    is one, and leaves one there after two steps where there is none."""
    settings = ADAM.model_copy(update={"offload": offload})
    with mock.patch.object(host_state, "PIECE", 3000):
        runner = checks.make_runner(
            path, layout, head, optimizer=settings, freeze=freeze, dtype=dtype
        )
    if ckpt is not None and ckpt.exists():
        runner.load(ckpt)
        ckpt = None
    losses = []
    batch = checks.mixed_batch()
    tokens = float(sum(s.response_mask.sum() for s in batch))
    loss = checks.weighted_loss(tokens) if head == "language" else checks.final_score_loss
    for step in range(steps):
        result = runner.train_step(batch, loss)
        losses.append((result.sums["loss"], result.grad_norm))
        if step == 1 and ckpt is not None:
            runner.save(ckpt, path)
    weights = _weights(runner)
    if offload:
        _check_pieces(runner, lambda: runner.train_step(batch, loss))
    return losses, weights


def _check_pieces(runner: ModelRunner, update: Callable[[], object]) -> None:
    """What an update has of the optimizer's state at a time."""
    state = list(runner._state.__self__._host)  # type: ignore[attr-defined]
    total = sum(tensor.nbytes for tensor in state)

    def there() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in state)

    seen = []
    with mock.patch.object(host_state, "_to_model", lambda *_: seen.append(there())):
        update()
    assert len(state) > 90 and len(seen) > 10, (len(state), len(seen))
    assert 0 < max(seen) < total / 2 and there() == 0, (seen, total)


CASES = {
    "dense": ("language", 2, TP2SP),
    "tied": ("language", 2, Layout(pipeline=2)),
    "moe": ("score", 2, TP2EP2),
    "deep": ("language", 2, Layout(pipeline=2, virtual_pipeline=3)),
}
OTHERS = {
    "dense": [
        (1, Layout()),
        (2, Layout(pipeline=2)),
        (2, Layout()),
        (4, TP2SP),
        (2, TP2SP_TOWER),
        (4, Layout(tensor=2, vision="replicated")),
    ],
    "tied": [(1, Layout()), (2, TP2SP)],
    "moe": [(1, Layout()), (2, Layout(expert=2)), (2, ETP2), (2, VPP2), (2, CP2EP2)],
    "deep": [(1, Layout()), (2, UNEVEN), (4, DEEP), (2, Layout(context=2))],
}


@pytest.fixture(scope="module", params=["dense", "tied", "moe", "deep"])
def stopped(
    request: pytest.FixtureRequest,
    ranks: Worlds,
    hf_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, Training]:
    """A run of four steps with a checkpoint after the second: (kind, checkpoint, all of it)."""
    kind = request.param
    head, world, layout = CASES[kind]
    ckpt = tmp_path_factory.mktemp(kind) / "ckpt"
    whole = ranks(world).run(_train, hf_models[kind], layout, head, 4, ckpt)[0]
    return kind, ckpt, whole


def test_resumed_training_is_bit_equal_at_the_same_layout(
    ranks: Worlds, hf_models: dict[str, Path], stopped: tuple[str, Path, Training]
) -> None:
    kind, ckpt, (losses, weights) = stopped
    head, world, layout = CASES[kind]
    resumed, found = ranks(world).run(_train, hf_models[kind], layout, head, 2, ckpt)[0]
    assert resumed == losses[2:]
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_state_in_host_memory_changes_no_bit(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """In BF16, where main weights are not the model's own; the model is cut into many pieces."""
    ckpt = tmp_path / "ckpt"

    def train(steps: int, path: Path | None, offload: bool) -> Training:
        arguments = (hf_models["moe"], TP2EP2, "score", steps, path, torch.bfloat16, ())
        found: Training = ranks(2).run(_train, *arguments, offload)[0]
        return found

    losses, weights = train(4, None, offload=False)
    whole, moved = train(4, ckpt, offload=True)
    resumed, found = train(2, ckpt, offload=True)
    assert whole == losses and resumed == losses[2:]
    for name, weight in weights.items():
        assert torch.equal(moved[name], weight) and torch.equal(found[name], weight), name


def test_training_goes_on_alike_at_other_layouts(
    ranks: Worlds, hf_models: dict[str, Path], stopped: tuple[str, Path, Training]
) -> None:
    kind, ckpt, (losses, weights) = stopped
    head = CASES[kind][0]
    for world, layout in OTHERS[kind]:
        resumed, found = ranks(world).run(_train, hf_models[kind], layout, head, 2, ckpt)[0]
        assert torch.tensor(resumed).allclose(torch.tensor(losses[2:]), rtol=1e-4), layout
        assert set(found) == set(weights)
        worst = max((found[name] - weight).abs().max() for name, weight in weights.items())
        # the steps moved weights by about lr = 1e-2
        assert worst < 2e-5, layout


def _go_on(path: Path, layout: Layout, ckpt: Path | None, out: Path) -> list[float]:
    """The losses of two more steps, and a checkpoint after them."""
    runner = checks.make_runner(path, layout, optimizer=ADAM)
    if ckpt is not None:
        runner.load(ckpt)
    batch = checks.mixed_batch()
    loss = checks.weighted_loss(float(sum(s.response_mask.sum() for s in batch)))
    losses = [runner.train_step(batch, loss).sums["loss"] for _ in range(2)]
    runner.save(out, path)
    return losses


def test_a_run_goes_from_tp2_to_pp2_to_tp1_with_the_same_loss(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    def train(layouts: list[tuple[int, Layout]], folder: Path) -> list[float]:
        losses, ckpt = list[float](), None
        for i, (world, layout) in enumerate(layouts):
            out = folder / f"{i}"
            losses += ranks(world).run(_go_on, hf_models["dense"], layout, ckpt, out)[0]
            ckpt = out
        return losses

    moved = [(2, TP2SP), (2, Layout(pipeline=2)), (1, Layout())]
    found, wanted = train(moved, tmp_path / "moved"), train([(2, TP2SP)] * 3, tmp_path / "stayed")
    assert wanted[0] - wanted[-1] > 0.1
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5


@pytest.mark.parametrize(
    "kind, world, layout",
    [("dense", 2, Layout()), ("moe", 4, CP2EP2)],
    ids=["dense-dp2", "moe-cp2"],
)
def test_each_rank_writes_its_own_part_of_the_optimizer_state(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, kind: str, world: int, layout: Layout
) -> None:
    """Of main weights and moments, once, and in no rank more than its share."""
    path, ckpt = hf_models[kind], tmp_path / "ckpt"
    ranks(world).run(_go_on, path, layout, None, ckpt)
    elements = dict.fromkeys(range(world), 0)
    stored = 0
    for index, info in FileSystemReader(ckpt).read_metadata().storage_data.items():
        if index.fqn.startswith("optimizer."):
            elements[int(info.relative_path[2:].split("_")[0])] += info.length // 4
    for key, tensor in TorchDistReader(ckpt).tensors.items():
        if key.startswith("optimizer."):
            stored += math.prod(tensor.size)
            assert sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == math.prod(tensor.size)
    assert stored <= sum(elements.values())
    share = stored / world
    # a chunk has a kilobyte of its own besides
    assert all(0.8 * share < count < 1.6 * share for count in elements.values()), elements


def _pass_on(path: Path, layout: Layout, ckpt: Path, out: Path) -> None:
    """Load and save again."""
    runner = checks.make_runner(path, layout, optimizer=ADAM)
    runner.load(ckpt)
    runner.save(out, path)


@pytest.mark.parametrize("stopped", ["dense"], indirect=True)
def test_a_checkpoint_goes_from_a_sharded_to_a_replicated_tower_and_back_bit_equal(
    ranks: Worlds, hf_models: dict[str, Path], stopped: tuple[str, Path, Training], tmp_path: Path
) -> None:
    """Weights and the optimizer's state."""
    kind, ckpt, _ = stopped
    there, back = tmp_path / "there", tmp_path / "back"
    ranks(2).run(_pass_on, hf_models[kind], TP2SP_TOWER, ckpt, there)
    ranks(2).run(_pass_on, hf_models[kind], TP2SP, there, back)
    source, found = TorchDistReader(ckpt), TorchDistReader(back)
    assert source.tensors.keys() == found.tensors.keys()
    assert len([key for key in found.tensors if "exp_avg_sq.vision_model" in key]) > 10
    for key, stored in source.tensors.items():
        start, size = [0] * len(stored.size), [*stored.size]
        same = torch.equal(found.read(key, start, size), source.read(key, start, size))
        assert same, key


RESHARDED = {"dense": TP2SP_TOWER, "tied": TP2SP, "moe": ETP2}


@pytest.mark.parametrize("stopped", RESHARDED, indirect=True)
def test_a_resharded_checkpoint_trains_on_and_each_rank_reads_its_own_pieces(
    ranks: Worlds, hf_models: dict[str, Path], stopped: tuple[str, Path, Training], tmp_path: Path
) -> None:
    kind, ckpt, _ = stopped
    head, layout, out = CASES[kind][0], RESHARDED[kind], tmp_path / "out"
    ranks(2).run(reshard, ckpt, out, layout)
    world = max(layout.tensor, layout.expert_tensor)
    trained = [
        ranks(world).run(_train, hf_models[kind], layout, head, 2, path)[0] for path in (ckpt, out)
    ]
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(trained[1][1][name], w) for name, w in trained[0][1].items())
    written = TorchDistReader(out).tensors
    assert written.keys() == TorchDistReader(ckpt).tensors.keys()
    assert sum(key.startswith("optimizer.") for key in written) > 30
    for key, stored in written.items():
        parts = layout.expert_tensor if ".experts." in key else layout.tensor
        if key.endswith("mlp.linear_fc1.weight") and key.count("language_model"):
            assert {c.sizes[-2] for c in stored.chunks} == {stored.size[-2] // 2 // parts}, key
        if key.endswith("linear_proj.weight"):
            parts = layout.vision_tensor if "vision_model" in key else layout.tensor
            assert {c.sizes[-1] for c in stored.chunks} == {stored.size[-1] // parts}, key
    assert sorted(f.name for f in (out / "hf").iterdir()) == sorted(
        f.name for f in (ckpt / "hf").iterdir()
    )


def test_resharding_carries_a_vocabulary_over_another_padding(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """203 tokens are no multiple of two."""
    whole, halves, again = (tmp_path / name for name in ("whole", "halves", "again"))
    ranks(1).run(hf_to_megatron.convert, hf_models["dense"], whole)
    ranks(1).run(reshard, whole, halves, TP2SP)
    ranks(2).run(reshard, halves, again, Layout())
    key = "language_model.embedding.word_embeddings.weight"
    sizes = [tuple(TorchDistReader(path).tensors[key].size) for path in (whole, halves, again)]
    assert sizes == [(VOCAB, 56), (VOCAB + 1, 56), (VOCAB, 56)]
    assert [inspect(path)["written_in_pieces"] for path in (whole, halves, again)] == [1, 2, 1]
    for path in (halves, again):
        assert ranks(1).run(verify, hf_models["dense"], path, False)[0]["differences"] == []


def test_resharding_refuses_what_cannot_be_cut(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    ranks(1).run(hf_to_megatron.convert, hf_models["dense"], tmp_path / "ckpt")
    for source, layout, words in [
        (tmp_path / "ckpt", Layout(tensor=5), "attention heads can't be split in 5"),
        (hf_models["dense"], Layout(), "is a Hugging Face directory"),
    ]:
        [message] = ranks(1).run(_reshard_error, source, tmp_path / "out", layout)
        assert words in message


def _reshard_error(ckpt: Path, out: Path, layout: Layout) -> str:
    try:
        reshard(ckpt, out, layout)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("world, layout", [(2, Layout(pipeline=2)), (2, TP2SP), (1, Layout())])
def test_training_of_a_part_goes_on_at_every_layout(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, world: int, layout: Layout
) -> None:
    """Saved at two pipeline stages, of which the second had nothing to train."""
    path, ckpt = hf_models["dense"], tmp_path / "ckpt"
    options = (ckpt, torch.float32, ("language",))
    losses, weights = ranks(2).run(_train, path, Layout(pipeline=2), "language", 4, *options)[0]
    resumed, found = ranks(world).run(_train, path, layout, "language", 2, *options)[0]
    if layout == Layout(pipeline=2):
        assert resumed == losses[2:]
    assert torch.tensor(resumed).allclose(torch.tensor(losses[2:]), rtol=1e-4)
    assert max((found[name] - weight).abs().max() for name, weight in weights.items()) < 2e-5


def test_a_converted_checkpoint_lacks_what_layers_keep_for_fp8(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    """Of whole layers and, in Transformer Engine's grouped linear, of each expert."""
    ranks(1).run(hf_to_megatron.convert, hf_models["moe"], tmp_path / "ckpt")
    prefix = "language_model.decoder.layers.0.mlp.experts.linear_fc1."
    wanted = {
        f"{prefix}_extra_state{i or ''}": ShardedObject(f"{prefix}_extra_state", None, (4,), (i,))
        for i in range(4)
    }
    chunk: dict[str, Any] = wanted | {f"{prefix}weight1": "kept"}
    megatron_directory._drop_extra_state({0: chunk}, tmp_path / "ckpt")
    assert list(chunk) == [f"{prefix}weight1"]


@pytest.mark.parametrize(
    "kind, world, layout",
    [
        ("moe", 1, Layout()),
        ("dense", 2, Layout()),
        ("dedicated", 2, TP2EP2),
        ("dedicated", 2, Layout(pipeline=2)),
    ],
    ids=["moe", "dense-dp2", "dedicated-tp2-ep2", "dedicated-pp2"],
)
def test_an_fp32_head_on_a_bf16_trunk_resumes_bit_equal(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, kind: str, world: int, layout: Layout
) -> None:
    def train(steps: int, ckpt: Path) -> Training:
        arguments = (hf_models[kind], layout, "score", steps, ckpt, torch.bfloat16)
        return ranks(world).run(_train, *arguments)[0]

    losses, weights = train(4, tmp_path / "ckpt")
    resumed, found = train(2, tmp_path / "ckpt")
    assert resumed == losses[2:]
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    exact = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert exact == set(Qwen3VLConfig.from_hf(hf_models[kind]).value_heads)
    assert {w.dtype for name, w in weights.items() if name not in exact} == {torch.bfloat16}


def _load_error(path: Path, ckpt: Path) -> str:
    runner = checks.make_runner(path, Layout())
    try:
        megatron_directory.load(ckpt, runner.model)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_of_another_architecture_is_refused(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    ckpt = tmp_path / "ckpt"
    ranks(1).run(_save, hf_models["dense"], Layout(), ckpt)
    [message] = ranks(1).run(_load_error, hf_models["moe"], ckpt)
    assert f"{ckpt} does not fit the model" in message
    assert "num_experts 0, not 4" in message


@pytest.mark.parametrize(
    "key, value, words",
    [("intermediate_size", 116, ["linear_fc1", "232, 56"]), ("num_hidden_layers", 5, ["layers"])],
)
def test_a_checkpoint_whose_config_was_edited_is_refused(
    ranks: Worlds,
    hf_models: dict[str, Path],
    tmp_path: Path,
    key: str,
    value: int,
    words: list[str],
) -> None:
    ckpt = tmp_path / "ckpt"
    ranks(1).run(_save, hf_models["dense"], Layout(), ckpt)
    raw = json.loads((ckpt / "hf" / "config.json").read_text())
    raw["text_config"][key] = value
    (ckpt / "hf" / "config.json").write_text(json.dumps(raw))
    [message] = ranks(1).run(_load_model_error, ckpt)
    assert f"{ckpt} does not fit the model" in message
    assert all(word in message for word in words), message


def _load_model_error(ckpt: Path) -> str:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(Layout())
    backend.seed(1, parallel)
    try:
        megatron_directory.load_model(ckpt, parallel, backend)
    except ValueError as error:
        return str(error)
    return "loaded"


def _killed_save(path: Path, out: Path) -> list[str]:
    runner = checks.make_runner(path, Layout())
    with (
        mock.patch.object(megatron_directory, "copy_config", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        megatron_directory.save(out, runner.model, path)
    left = [p.name for p in out.parent.iterdir()]
    megatron_directory.save(out, runner.model, path)
    return left


def test_a_killed_save_leaves_nothing_under_the_final_name(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "ckpt"
    [left] = ranks(1).run(_killed_save, hf_models["dense"], out)
    assert out.name not in left
    # the next attempt is not disturbed by what the first one left
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert ranks(1).run(_differing, hf_models["dense"], Layout(), out) == [[]]


def test_neither_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="neither a Hugging Face directory"):
        hf_directory(tmp_path)


def test_an_export_loads_in_transformers_without_a_complaint(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    ckpt, out = tmp_path / "ckpt", tmp_path / "hf"
    ranks(2).run(_train, hf_models["dense"], TP2SP, "language", 2, ckpt)
    ranks(1).run(megatron_to_hf.export, ckpt, out)
    exported, info = Qwen3VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    sequence = checks.mixed_batch()[2]
    with torch.no_grad():
        found = hf_reference.logits(exported.eval(), sequence)
        initial = hf_reference.logits(hf_reference.load(hf_models["dense"]), sequence)
    [wanted] = ranks(1).run(_logits, ckpt)
    assert hf_reference.distance(found, wanted) < 1e-4
    assert hf_reference.distance(found, initial) > 1e-2


def _logits(ckpt: Path) -> Tensor:
    backend = backends.create("cpu")
    parallel = checks.parallel_state(Layout())
    backend.seed(1, parallel)
    model = megatron_directory.load_model(ckpt, parallel, backend).eval()
    runner = ModelRunner(model, micro_batch_tokens=64, pad_id=0, optimizer=None)
    sequences = [checks.mixed_batch()[2]]
    [batch] = runner._micro_batches(sequences, runner._plan(sequences))
    with torch.no_grad():
        return model(batch, output="logits")


def _upcycle(
    dense: Path, out: Path, noise: float, seed: int = 5, architecture: str = "shared"
) -> Path:
    experts = 6 if architecture == "dedicated" else 3
    upcycle(dense, out, experts, 2, noise, 0.02, seed, architecture)
    return out


def _wrong_heads(path: Path, architecture: str) -> str:
    """Load a discriminator whose config.json was edited to another architecture."""
    raw = json.loads((path / "config.json").read_text())
    raw["prism_discriminator"] = {"architecture": architecture}
    (path / "config.json").write_text(json.dumps(raw))
    try:
        megatron_directory.load_model(
            path, checks.parallel_state(Layout()), backends.create("cpu"), "score"
        )
    except ValueError as error:
        return str(error)
    return "loaded"


def test_heads_of_another_architecture_are_refused(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path
) -> None:
    dedicated = _upcycle(hf_models["dense"], tmp_path / "moe", 0.01, architecture="dedicated")
    [message] = ranks(1).run(_wrong_heads, dedicated, "shared")
    assert "1 missing (v_head.1.weight)" in message
    assert "2 surplus (v_head.perception.weight, v_head.reasoning.weight)" in message


def test_upcycled_without_noise_it_computes_what_the_dense_model_did(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    dense, moe = hf_models["dense"], _upcycle(hf_models["dense"], tmp_path / "moe", 0.0)
    for sequence in checks.mixed_batch():
        with torch.no_grad():
            wanted = hf_reference.logits(hf_reference.load(dense), sequence)
            found = hf_reference.logits(hf_reference.load(moe), sequence)
        assert hf_reference.distance(found, wanted) < 1e-5


def test_upcycling_writes_seeded_noise_around_the_dense_weights(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    dense = load_file(hf_models["dense"] / "model.safetensors")
    first, same, other = (
        HFDirectory(_upcycle(hf_models["dense"], tmp_path / name, 0.01, seed))
        for name, seed in (("first", 5), ("same", 5), ("other", 6))
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in same.items())
    layer = "model.language_model.layers.3.mlp."
    down, gate_up = first[layer + "experts.down_proj"], first[layer + "experts.gate_up_proj"]
    assert not torch.equal(down, other[layer + "experts.down_proj"])
    noise = down - dense[layer + "down_proj.weight"]
    assert noise.shape == (3, 56, 112)
    assert float(noise.std()) == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(noise[0], noise[1])
    halves = torch.cat([dense[layer + "gate_proj.weight"], dense[layer + "up_proj.weight"]])
    assert float((gate_up - halves).abs().max()) < 0.06
    assert first[layer + "gate.weight"].shape == (3, 56)
    assert first["v_head.1.weight"].shape == (1, 56)
    untouched = [name for name in dense if ".mlp." not in name or ".visual." in name]
    assert all(torch.equal(first[name], dense[name]) for name in untouched)


def test_upcycled_configuration_says_what_the_weights_are(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    out = _upcycle(hf_models["tied"], tmp_path / "moe", 0.01)
    config = Qwen3VLConfig.from_hf(out)
    assert (config.num_experts, config.top_k, config.moe_intermediate_size) == (3, 2, 112)
    assert config.tie_word_embeddings
    assert config.rope_theta == 5e6
    assert not list(tmp_path.glob(".*"))


def test_upcycling_refuses_what_it_cannot_do(hf_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k=4 of num_experts=3"):
        upcycle(hf_models["dense"], tmp_path / "moe", 3, 4, 0.0, 0.02, 1)
    with pytest.raises(ValueError, match="top_k=0 of num_experts=3"):
        upcycle(hf_models["dense"], tmp_path / "moe", 3, 0, 0.0, 0.02, 1)
    with pytest.raises(ValueError, match="has experts already"):
        upcycle(hf_models["moe"], tmp_path / "moe", 3, 2, 0.0, 0.02, 1)
    with pytest.raises(ValueError, match="num_experts=6 .* top_k=4 of its section's"):
        upcycle(hf_models["dense"], tmp_path / "moe", 6, 4, 0.0, 0.02, 1, "dedicated")
    with pytest.raises(ValueError, match="num_experts=5"):
        upcycle(hf_models["dense"], tmp_path / "moe", 5, 2, 0.0, 0.02, 1, "dedicated")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("architecture", ["shared", "dedicated", "dense"])
def test_an_upcycled_model_converts_with_its_value_head(
    ranks: Worlds, hf_models: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    ckpt = tmp_path / "ckpt"
    moe = _upcycle(hf_models["dense"], tmp_path / "moe", 0.01, architecture=architecture)
    config = Qwen3VLConfig.from_hf(moe)
    assert config.dedicated == (architecture == "dedicated")
    assert bool(config.num_experts) == (architecture != "dense")
    ranks(1).run(hf_to_megatron.convert, moe, ckpt)
    out = tmp_path / "again"
    ranks(1).run(megatron_to_hf.export, ckpt, out)
    before, after = HFDirectory(moe), HFDirectory(out)
    # a discriminator has no language head to give back
    assert set(before) - set(after) == {"lm_head.weight"}
    assert set(config.value_heads) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in after)
