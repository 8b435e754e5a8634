"""The streaming tools: what goes in comes out, at any layout, in either format, after any kill; and
what is damaged is refused by name."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from checkpoint_tools import (
    files,
    hf_to_megatron,
    hf_writer,
    megatron_directory,
    megatron_to_hf,
    torch_dist,
    verify,
)
from checkpoint_tools.headers import SINGLE
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.inspect import inspect
from checkpoint_tools.megatron_weights import MegatronWeights
from checkpoint_tools.merge import merge
from checkpoint_tools.upcycle import upcycle
from model_providers import backend as backends
from model_providers.parallel import Layout
from tests.dist import checks
from tests.dist.ranks import Ranks

Worlds = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def sources(
    hf_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The tiny models and two discriminators made of them."""
    root = tmp_path_factory.mktemp("discriminators")
    for name, architecture, experts in (("judge", "shared", 3), ("two-judges", "dedicated", 6)):
        upcycle(hf_models["dense"], root / name, experts, 2, 0.01, 0.02, 5, architecture)
    return hf_models | {name: root / name for name in ("judge", "two-judges")}


def _resave(ckpt: Path, layout: Layout, out: Path) -> None:
    """Load at a layout and save again, as training there would."""
    backend, parallel = backends.create("cpu"), checks.parallel_state(layout)
    backend.seed(1, parallel)
    head = "score" if "judge" in str(ckpt) else "language"
    model = megatron_directory.load_model(ckpt, parallel, backend, head)
    megatron_directory.save(out, model, ckpt / "hf")


def _equal(first: Path, second: Path) -> None:
    before, after = HFDirectory(first), HFDirectory(second)
    unused = {"lm_head.weight"} if "judge" in first.name else set()
    assert set(before) - unused == set(after)
    for name in after:
        assert torch.equal(before[name], after[name]), name
        assert before.like(name).dtype == after.like(name).dtype


@pytest.mark.parametrize(
    "kind, converters, world, layout",
    [
        ("dense", 1, 2, Layout(tensor=2, sequence_parallel=True)),
        ("dense", 2, 4, Layout(tensor=2, pipeline=2)),
        ("tied", 2, 2, Layout(pipeline=2)),
        ("moe", 1, 2, Layout(tensor=2, expert=2, sequence_parallel=True)),
        ("moe", 2, 2, Layout(expert_tensor=2)),
        ("deep", 1, 2, Layout(pipeline=2, virtual_pipeline=3)),
        ("judge", 1, 2, Layout(tensor=2, sequence_parallel=True)),
        ("two-judges", 2, 2, Layout(expert=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_round_trip_over_a_layout_is_bit_equal(
    ranks: Worlds,
    sources: dict[str, Path],
    tmp_path: Path,
    kind: str,
    converters: int,
    world: int,
    layout: Layout,
) -> None:
    """Hugging Face -> Megatron -> loaded and saved at the layout -> Hugging Face."""
    ckpt, again, out = (tmp_path / f"{kind}-{step}" for step in ("ckpt", "again", "hf"))
    ranks(converters).run(hf_to_megatron.convert, sources[kind], ckpt)
    ranks(world).run(_resave, ckpt, layout, again)
    ranks(1).run(megatron_to_hf.export, again, out)
    _equal(sources[kind], out)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", hf_writer.LAYOUTS)
def test_both_transformers_layouts_load_in_transformers(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path, layout: Any
) -> None:
    ckpt, out = tmp_path / "ckpt", tmp_path / "hf"
    ranks(1).run(hf_to_megatron.convert, sources["moe"], ckpt)
    ranks(1).run(megatron_to_hf.export, ckpt, out, layout)
    raw = json.loads((out / "config.json").read_text())
    assert raw["transformers_version"].startswith(layout)
    stored = load_file(out / SINGLE)["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    assert stored.shape == ((4, 56, 80) if layout == "4.57" else (4, 80, 56))
    wanted = AutoModelForImageTextToText.from_pretrained(sources["moe"]).state_dict()
    found, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    assert found.config.text_config.rope_parameters["rope_theta"] == 5e6


def test_a_checkpoint_keeps_the_types_of_its_source(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    hf_writer.copy_config(sources["judge"], half)
    weights = {
        name: tensor if name.startswith("v_head") else tensor.bfloat16()
        for name, tensor in load_file(sources["judge"] / SINGLE).items()
    }
    save_file(weights, half / SINGLE)
    ranks(1).run(hf_to_megatron.convert, half, tmp_path / "judge-ckpt")
    ranks(1).run(megatron_to_hf.export, tmp_path / "judge-ckpt", tmp_path / "out")
    out = HFDirectory(tmp_path / "out")
    assert out.like("v_head.1.weight").dtype is torch.float32
    assert out.like("model.visual.pos_embed.weight").dtype is torch.bfloat16


STEPS: dict[Any, tuple[str, ...]] = {
    torch_dist: ("write_atomically", "publish"),
    hf_to_megatron: ("copy_config",),
    hf_writer: ("save_file", "publish", "copy_config", "write_atomically"),
    os: ("fsync", "replace"),
}
"""What touches the disk."""


def _convert_until_killed(kind: str, source: Path, out: Path, steps: int) -> None:
    """The conversion in this process, which kills itself after so many steps."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    backends.create("cpu").init_process_group()
    for module, names in STEPS.items():
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    hf_writer.SHARD_BYTES = 50_000
    if kind == "import":
        hf_to_megatron.convert(source, out)
    else:
        megatron_to_hf.export(source, out)


def _finished_parts(kind: str, staging: Path) -> dict[str, int]:
    """Files that may not be written again, and when they were."""
    if kind == "export":
        names = {file.name for file in staging.glob("model*.safetensors")}
    else:
        names = {f"__{file.stem}_0.distcp" for file in staging.glob("parts/[0-9]*.json")}
    return {name: (staging / name).stat().st_mtime_ns for name in names}


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_conversion_killed_anywhere_goes_on(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Killed 20 times and more before it ends: nothing half-written has the final name, what is
    finished is not written again, and the result is whole."""
    source = sources["moe"]
    if kind == "export":
        source = tmp_path / "ckpt"
        ranks(1).run(hf_to_megatron.convert, sources["moe"], source)
    out, staging = tmp_path / "out", files.staging_of(tmp_path / "out")
    kills, finished, pick = 0, dict[str, int](), random.Random(4)
    # every process would import torch anew
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    while True:
        steps = pick.randrange(1, 5 + kills)
        process = context.Process(target=_convert_until_killed, args=(kind, source, out, steps))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert not out.exists()
        found = _finished_parts(kind, staging)
        assert finished.items() <= found.items()
        finished = found
    assert kills >= 20
    if kind == "import":
        ranks(1).run(megatron_to_hf.export, out, tmp_path / "hf")
        out = tmp_path / "hf"
    _equal(sources["moe"], out)
    assert not staging.exists()


def _refusal(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "accepted"


def _damaged(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    hf_writer.copy_config(source, target)
    weights = load_file(source / SINGLE)
    change(weights)
    save_file(weights, target / SINGLE)
    return target


LAYER = "model.language_model.layers.2."


def _nan(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "mlp.down_proj.weight"][3, 5] = math.nan


def _infinite(weights: dict[str, Tensor]) -> None:
    weights["model.visual.pos_embed.weight"][1, 2] = math.inf


def _missing(weights: dict[str, Tensor]) -> None:
    del weights[LAYER + "self_attn.k_norm.weight"]


def _surplus(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "self_attn.q_proj.bias"] = torch.zeros(96)


def _shape(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "self_attn.k_proj.weight"] = torch.zeros(31, 56)


def _dtype(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "self_attn.o_proj.weight"] = torch.zeros(56, 96, dtype=torch.bfloat16)


def _scales(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)


def _quantised(weights: dict[str, Tensor]) -> None:
    weights[LAYER + "mlp.up_proj.weight"] = torch.zeros(112, 56, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change, words",
    [
        (_nan, [LAYER + "mlp.down_proj.weight", "NaN or infinite", SINGLE]),
        (_infinite, ["model.visual.pos_embed.weight", "NaN or infinite", SINGLE]),
        (_missing, ["1 missing", LAYER + "self_attn.k_norm.weight"]),
        (_surplus, ["1 surplus", LAYER + "self_attn.q_proj.bias"]),
        (_shape, [LAYER + "self_attn.k_proj.weight", "(31, 56)", "(32, 56)"]),
        (_dtype, [LAYER + "self_attn.o_proj.weight", "bfloat16", "float32"]),
        (_scales, ["weights in FP8, with scales beside them; give the BF16 release"]),
        (_quantised, [LAYER + "mlp.up_proj.weight", "F8_E4M3"]),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else None,
)
def test_weights_that_cannot_be_right_are_refused(
    ranks: Worlds,
    sources: dict[str, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    words: list[str],
) -> None:
    source = _damaged(sources["dense"], tmp_path / "source", change)
    [message] = ranks(1).run(_refusal, hf_to_megatron.convert, source, tmp_path / "ckpt")
    assert all(word in message for word in words), message
    assert not (tmp_path / "ckpt").exists()


def test_a_tied_head_that_is_not_the_embedding_is_refused(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    def untie(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] + 1

    source = _damaged(sources["tied"], tmp_path / "source", untie)
    [message] = ranks(1).run(_refusal, hf_to_megatron.convert, source, tmp_path / "ckpt")
    assert "ties lm_head.weight" in message


def _left_out_head(source: Path) -> str:
    (source / "value_head.pt").touch()
    return "has a value_head.pt, a pickle that is read on request only"


def _claimed_head(source: Path) -> str:
    file = source / "config.json"
    raw = json.loads(file.read_text()) | {"prism_discriminator": {"architecture": "dense"}}
    file.write_text(json.dumps(raw))
    return "has no value head, but its config.json is a discriminator's"


@pytest.mark.parametrize("change", [_left_out_head, _claimed_head])
def test_a_discriminator_without_its_head_is_refused(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path, change: Callable[[Path], str]
) -> None:
    source = _damaged(sources["dense"], tmp_path / "source", lambda weights: None)
    words = change(source)
    [message] = ranks(1).run(_refusal, hf_to_megatron.convert, source, tmp_path / "ckpt")
    assert words in message


@pytest.fixture
def ckpt(ranks: Worlds, sources: dict[str, Path], tmp_path: Path) -> Path:
    ranks(1).run(hf_to_megatron.convert, sources["dense"], tmp_path / "ckpt")
    return tmp_path / "ckpt"


def _cut_metadata(ckpt: Path) -> str:
    file = ckpt / ".metadata"
    file.write_bytes(file.read_bytes()[:200])
    return ".metadata is truncated"


def _no_metadata(ckpt: Path) -> str:
    (ckpt / ".metadata").unlink()
    return ".metadata is missing"


def _cut_part(ckpt: Path) -> str:
    file = ckpt / "__3_0.distcp"
    file.write_bytes(file.read_bytes()[:600])
    return "__3_0.distcp"


def _no_part(ckpt: Path) -> str:
    (ckpt / "__3_0.distcp").unlink()
    return "__3_0.distcp"


def _other_config(ckpt: Path) -> str:
    file = ckpt / "hf" / "config.json"
    raw = json.loads(file.read_text())
    raw["text_config"]["intermediate_size"] = 116
    file.write_text(json.dumps(raw))
    return "has shape (4, 224, 56), its config.json wants (4, 232, 56)"


def _hostile(ckpt: Path) -> str:
    (ckpt / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/hostile'\ntR.")
    return "posix.system has no place" if os.name != "posix" else "has no place in a checkpoint"


def _outside(ckpt: Path) -> str:
    """A file that is elsewhere, as another checkpoint's would be."""
    file = ckpt / ".metadata"
    elsewhere = b"/" + b"x" * (len("__3_0.distcp") - 1)
    file.write_bytes(file.read_bytes().replace(b"__3_0.distcp", elsewhere))
    return "['/xxxxxxxxxxx']; its files lie beside it"


def _no_instructions(ckpt: Path) -> str:
    (ckpt / ".metadata").write_bytes(b"N.")
    return ".metadata is truncated or no torch_dist metadata"


@pytest.mark.parametrize(
    "damage",
    [
        _cut_metadata,
        _no_metadata,
        _cut_part,
        _no_part,
        _other_config,
        _hostile,
        _outside,
        _no_instructions,
    ],
)
def test_damaged_checkpoints_are_refused(
    ranks: Worlds, ckpt: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    words = damage(ckpt)
    [message] = ranks(1).run(_refusal, megatron_to_hf.export, ckpt, tmp_path / "hf")
    assert words in message
    assert not (tmp_path / "hf").exists() and not Path("/tmp/hostile").exists()


def test_a_full_disk_is_noticed_before_the_start(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "ckpt"
    [message] = ranks(1).run(_on_a_full_disk, sources["dense"], out)
    assert f"{out} needs" in message and "GiB free" in message


def _on_a_full_disk(source: Path, out: Path) -> str:
    usage = mock.Mock(free=1000)
    with mock.patch.object(files.shutil, "disk_usage", return_value=usage):
        return _refusal(hf_to_megatron.convert, source, out)


def _export_of_a_removed_checkpoint(ckpt: Path, out: Path) -> str:
    """Training removes it when the first shard is written."""
    save = hf_writer._save

    def saved(*args: Any) -> None:
        save(*args)
        shutil.rmtree(ckpt)

    with (
        mock.patch.object(hf_writer, "_save", saved),
        mock.patch.object(hf_writer, "SHARD_BYTES", 50_000),
    ):
        return _refusal(megatron_to_hf.export, ckpt, out)


def test_an_export_whose_checkpoint_training_removes_says_so(
    ranks: Worlds, ckpt: Path, tmp_path: Path
) -> None:
    [message] = ranks(1).run(_export_of_a_removed_checkpoint, ckpt, tmp_path / "hf")
    assert "distcp with" in message and "train.keep_checkpoints" in message
    assert not (tmp_path / "hf").exists()


def _spoilt_live_export(source: Path, out: Path) -> str:
    weights = load_file(source / SINGLE)
    weights[LAYER + "mlp.up_proj.weight"][1, 2] = math.nan
    return _refusal(hf_writer.write, out, weights.items(), 1000, source)


def test_all_ranks_hear_that_a_live_export_failed(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    messages = ranks(2).run(_spoilt_live_export, sources["dense"], tmp_path / "hf")
    assert all(LAYER + "mlp.up_proj.weight has 1 of" in message for message in messages), messages
    assert not (tmp_path / "hf").exists()


def _corrupted_conversion(path: Path, out: Path) -> str:
    """A writer that flips a bit of what it was given."""
    resolve = torch_dist._From.resolve_data

    def flipped(self: Any, item: Any) -> Any:
        found = resolve(self, item)
        if "linear_proj" in item.index.fqn:
            found = found.clone()
            found.view(-1).view(torch.int32)[0] ^= 1
        return found

    with mock.patch.object(torch_dist._From, "resolve_data", flipped):
        return _refusal(hf_to_megatron.convert, path, out)


def test_a_conversion_that_changes_a_bit_says_so(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    [message] = ranks(1).run(_corrupted_conversion, sources["dense"], tmp_path / "ckpt")
    assert "differs from" in message and "1 of 2304 elements" in message
    assert not (tmp_path / "ckpt").exists()


def _corrupted_disk(tool: Callable[..., Any], source: Path, out: Path) -> str:
    """A disk that flips a bit of the first file that it is given."""
    add, seen = files.WriteBehind.add, list[Path]()

    def flipped(self: Any, file: Path, *args: Any) -> None:
        if not seen:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        seen.append(file)
        add(self, file, *args)

    with mock.patch.object(files.WriteBehind, "add", flipped):
        return _refusal(tool, source, out)


@pytest.mark.parametrize("kind", ["import", "export"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_disk_that_changes_a_bit_is_noticed_before_the_file_counts(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path, kind: str, model: str
) -> None:
    source, out = sources[model], tmp_path / "out"
    tool: Callable[..., Any] = hf_to_megatron.convert
    if kind == "export":
        source, tool = tmp_path / "ckpt", megatron_to_hf.export
        ranks(1).run(hf_to_megatron.convert, sources[model], source)
    [message] = ranks(1).run(_corrupted_disk, tool, source, out)
    assert "differs from" in message and "1 tensors" in message, message
    assert not out.exists() and not _finished_parts(kind, files.staging_of(out))
    ranks(1).run(tool, source, out)
    assert out.exists()


def _unpublished(source: Path, out: Path, verify: bool) -> dict[str, int]:
    """Conversion up to the last step: when each file was written."""
    with mock.patch.object(torch_dist, "publish", side_effect=ValueError("killed")):
        assert _refusal(hf_to_megatron.convert, source, out, None, verify) == "killed"
    return _finished_parts("import", files.staging_of(out))


def test_what_was_not_compared_is_written_again_when_asked_to(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    runs = [
        ranks(1).run(_unpublished, sources["dense"], tmp_path / "ckpt", verify)[0]
        for verify in (False, True, True)
    ]
    assert runs[0].keys() == runs[1].keys() and len(runs[0]) > 10
    assert not runs[0].items() & runs[1].items()
    assert runs[1] == runs[2]


def test_a_part_that_lost_a_tensor_is_noticed_at_the_end(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    ranks(1).run(_unpublished, sources["dense"], tmp_path / "ckpt", True)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    for file in files.staging_of(tmp_path / "ckpt").glob("parts/*.json"):
        record = json.loads(file.read_text())
        kept = [entry for entry in record["tensors"] if not entry["key"].endswith(key)]
        if len(kept) < len(record["tensors"]):
            file.write_text(json.dumps(record | {"tensors": kept}))
            break
    [message] = ranks(1).run(_refusal, hf_to_megatron.convert, sources["dense"], tmp_path / "ckpt")
    assert f"elements of vision_model.{key} are stored" in message
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("kind", ["dense", "tied", "moe", "judge"])
def test_verify_compares_what_both_compute(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    ranks(1).run(hf_to_megatron.convert, sources[kind], tmp_path / "ckpt")
    [report] = ranks(1).run(verify.verify, sources[kind], tmp_path / "ckpt")
    assert report["differences"] == [] and report["logits"] <= 1e-4, report
    assert report["tensors"] == len(HFDirectory(sources[kind])) - (kind == "judge")


def test_verify_names_what_differs(ranks: Worlds, sources: dict[str, Path], ckpt: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights[LAYER + "mlp.up_proj.weight"][0, 0] += 1

    other = _damaged(sources["dense"], ckpt.parent / "other", change)
    [report] = ranks(1).run(verify.verify, other, ckpt)
    assert [d["name"] for d in report["differences"]] == [LAYER + "mlp.up_proj.weight"]
    assert "1 of 6272 elements" in report["differences"][0]["detail"]


def test_verify_would_see_other_results_from_equal_weights(
    ranks: Worlds, sources: dict[str, Path], ckpt: Path
) -> None:
    file = ckpt / "hf" / "config.json"
    raw = json.loads(file.read_text())
    raw["text_config"]["rope_parameters"]["rope_theta"] = 5e5
    file.write_text(json.dumps(raw))
    [report] = ranks(1).run(verify.verify, sources["dense"], ckpt)
    assert [d["kind"] for d in report["differences"]] == ["logits"]


def test_inspect_says_what_a_checkpoint_is(sources: dict[str, Path], ckpt: Path) -> None:
    ours, theirs = inspect(ckpt), inspect(sources["dense"])
    assert ours["kind"].startswith("Megatron") and theirs["kind"].startswith("Hugging Face")
    assert ours["parameters"] == theirs["parameters"] > 100_000
    assert ours["dtypes"] == theirs["dtypes"] == {"float32": ours["parameters"]}
    assert (ours["layers"], ours["experts"], ours["optimizer"]) == (4, 0, False)
    assert (ours["written_in_pieces"], theirs["bytes"]) == (1, 4 * theirs["parameters"])
    assert inspect(sources["judge"])["discriminator"] == "shared"


def test_inspect_imports_nothing_that_takes_seconds(sources: dict[str, Path], ckpt: Path) -> None:
    for path in (ckpt, sources["dense"]):
        code = f"import checkpoint_tools.inspect as i, sys; i.main(['--ckpt', {str(path)!r}])"
        code += "; assert not {'torch', 'megatron', 'transformers'} & sys.modules.keys()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert "parameters" in ended.stdout


def test_merge_adds_up_what_it_is_given(
    ranks: Worlds, sources: dict[str, Path], ckpt: Path, tmp_path: Path
) -> None:
    def double(weights: dict[str, Tensor]) -> None:
        for tensor in weights.values():
            tensor *= 2

    doubled = _damaged(sources["dense"], tmp_path / "doubled", double)
    ranks(1).run(merge, [ckpt, doubled], tmp_path / "merged", [0.25, 0.75])
    source, merged = HFDirectory(sources["dense"]), HFDirectory(tmp_path / "merged")
    assert set(source) == set(merged)
    for name in source:
        torch.testing.assert_close(merged[name], source[name] * 1.75)


def test_merge_refuses_what_does_not_fit(
    ranks: Worlds, sources: dict[str, Path], tmp_path: Path
) -> None:
    pair, out = [sources["dense"], sources["moe"]], tmp_path / "out"
    assert "another architecture" in ranks(1).run(_refusal, merge, pair, out, [0.5, 0.5])[0]
    assert "add up to 0.9" in ranks(1).run(_refusal, merge, pair, out, [0.5, 0.4])[0]


def test_only_what_is_asked_for_is_read(ranks: Worlds, ckpt: Path) -> None:
    """A tensor costs its own bytes, however many layers the checkpoint has."""
    [read] = ranks(1).run(_bytes_read, ckpt)
    assert read == 56 * 112 * 4


def _bytes_read(ckpt: Path) -> int:
    weights = MegatronWeights(ckpt)
    read = 0
    original = torch_dist._box

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        nonlocal read
        read += tensor.nbytes
        return original(tensor, *args)

    with mock.patch.object(torch_dist, "_box", counted):
        assert LAYER + "mlp.up_proj.weight" in weights
        weights[LAYER + "mlp.down_proj.weight"]
    return read
