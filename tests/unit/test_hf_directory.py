"""Hugging Face directories: both layouts of fused experts, both dialects of the configuration, and
every way in which files can be incomplete."""

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

from checkpoint_tools import hf_writer
from checkpoint_tools.files import identity
from checkpoint_tools.headers import INDEX, SINGLE
from checkpoint_tools.hf_directory import HFDirectory
from checkpoint_tools.hf_writer import write
from model_providers.architecture import Qwen3VLConfig
from tests import tiny_models

GATE_UP = "model.language_model.layers.{}.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.{}.mlp.experts.down_proj"
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: tiny_models.save(root / kind, kind) for kind in ("dense", "moe")}


def _copy(source: Path, target: Path, edit: Edit = lambda raw: None) -> Path:
    hf_writer.copy_config(source, target)
    raw = json.loads((target / "config.json").read_text())
    edit(raw)
    (target / "config.json").write_text(json.dumps(raw))
    return target


def _sharded(source: Path, target: Path) -> tuple[Path, dict[str, Path]]:
    """The weights of `source` in two shards with an index; which name is where."""
    _copy(source, target)
    weights = load_file(source / SINGLE)
    names = sorted(weights)
    half = len(names) // 2
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed = {}
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save_file({name: weights[name] for name in part}, target / file)
        listed |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return target, {name: target / file for name, file in listed.items()}


def test_shards_read_like_a_single_file(saved: dict[str, Path], tmp_path: Path) -> None:
    sharded, _ = _sharded(saved["moe"], tmp_path / "sharded")
    weights, directory = load_file(saved["moe"] / SINGLE), HFDirectory(sharded)
    assert set(directory) == set(weights)
    assert len(directory) == len(weights)
    assert all(torch.equal(directory[name], weights[name]) for name in weights)


@pytest.mark.parametrize("file", ["/etc/model.safetensors", "../other/model.safetensors"])
def test_an_index_names_files_beside_it_alone(
    saved: dict[str, Path], tmp_path: Path, file: str
) -> None:
    sharded, _ = _sharded(saved["dense"], tmp_path / "sharded")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index.json names \['{file}'\]; shards lie beside"):
        HFDirectory(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": {"a', "[]", '{"weight_map": ["a"]}', "{}"])
def test_a_damaged_index_is_named(saved: dict[str, Path], tmp_path: Path, content: str) -> None:
    sharded, _ = _sharded(saved["dense"], tmp_path / "sharded")
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{sharded / INDEX} is truncated or no index of shards"):
        HFDirectory(sharded)


def test_a_single_file_beside_an_index_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    sharded, _ = _sharded(saved["dense"], tmp_path / "sharded")
    save_file({"lm_head.weight": torch.zeros(3)}, sharded / SINGLE)
    with pytest.raises(ValueError, match="of which readers take one or the other"):
        HFDirectory(sharded)


def test_a_model_in_the_hubs_cache_is_copied_not_linked(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    """There a snapshot's files are links to blobs, and the snapshot may be a link itself."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, file in enumerate(sorted(saved["dense"].iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / str(i))
    (tmp_path / "link").symlink_to(snapshot)
    weights = HFDirectory(tmp_path / "link")
    out, job = tmp_path / "out", {"from": identity(tmp_path / "link")}
    assert len(job["from"]) == len(list(saved["dense"].iterdir()))
    hf_writer.export(out, weights, tmp_path / "link", job)
    assert not any(file.is_symlink() for file in out.iterdir())
    shutil.rmtree(blobs)
    assert len(HFDirectory(out)) == len(weights)


def test_missing_shard_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    sharded, files = _sharded(saved["dense"], tmp_path / "sharded")
    lost = files["lm_head.weight"]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost} is missing"):
        HFDirectory(sharded)


@pytest.mark.parametrize("keep", [0, 5, 4000])
def test_truncated_file_is_named(saved: dict[str, Path], tmp_path: Path, keep: int) -> None:
    copy = _copy(saved["dense"], tmp_path / "copy")
    (copy / SINGLE).write_bytes((saved["dense"] / SINGLE).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{copy / SINGLE} is truncated"):
        HFDirectory(copy)


def test_a_tensor_in_two_shards_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    sharded, files = _sharded(saved["dense"], tmp_path / "sharded")
    second = sharded / "model-00002-of-00002.safetensors"
    twice = min(files)
    save_file(load_file(second) | {twice: torch.zeros(3)}, second)
    with pytest.raises(ValueError, match=f"{twice} is in .*00001-of.* and in .*00002-of"):
        HFDirectory(sharded)


@pytest.mark.parametrize("change", ["listed but absent", "present but not listed"])
def test_an_index_that_disagrees_is_refused(
    saved: dict[str, Path], tmp_path: Path, change: str
) -> None:
    sharded, _ = _sharded(saved["dense"], tmp_path / "sharded")
    index = json.loads((sharded / INDEX).read_text())
    if change == "listed but absent":
        index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
        name = "ghost.weight"
    else:
        name = "lm_head.weight"
        del index["weight_map"][name]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"disagree on 1 names: \['{name}'\]"):
        HFDirectory(sharded)


def _is_expert(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _transposed_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.transpose(1, 2).contiguous() if _is_expert(name) else tensor
        for name, tensor in weights.items()
    }


def test_experts_of_transformers_4_read_like_those_of_5(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    old = _copy(saved["moe"], tmp_path / "old")
    weights = load_file(saved["moe"] / SINGLE)
    save_file(_transposed_experts(weights), old / SINGLE)
    directory = HFDirectory(old)
    assert directory[GATE_UP.format(1)].shape == (4, 80, 56)
    assert directory[DOWN.format(1)].shape == (4, 56, 40)
    assert all(torch.equal(directory[name], weights[name]) for name in weights)


def _square(raw: dict[str, Any]) -> None:
    """gate_up_proj becomes [4, 56, 56] in either layout."""
    raw["text_config"]["moe_intermediate_size"] = 28
    raw.pop("transformers_version", None)


@pytest.mark.parametrize("version, turned", [("4.57.1", True), ("5.6.0", False)])
def test_square_experts_follow_the_writer(
    saved: dict[str, Path], tmp_path: Path, version: str, turned: bool
) -> None:
    def edit(raw: dict[str, Any]) -> None:
        _square(raw)
        raw["transformers_version"] = version

    copy = _copy(saved["moe"], tmp_path / "copy", edit)
    tensor = torch.randn(4, 56, 56)
    save_file({GATE_UP.format(0): tensor}, copy / SINGLE)
    wanted = tensor.transpose(1, 2) if turned else tensor
    assert torch.equal(HFDirectory(copy)[GATE_UP.format(0)], wanted)


def test_square_experts_of_an_unknown_writer_are_refused(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    copy = _copy(saved["moe"], tmp_path / "copy", _square)
    save_file({GATE_UP.format(0): torch.randn(4, 56, 56)}, copy / SINGLE)
    with pytest.raises(ValueError, match="is square, so its layout can't be seen"):
        HFDirectory(copy)[GATE_UP.format(0)]


def test_experts_of_another_size_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    copy = _copy(saved["moe"], tmp_path / "copy")
    save_file({DOWN.format(0): torch.randn(4, 56, 41)}, copy / SINGLE)
    with pytest.raises(ValueError, match=r"has shape \(4, 56, 41\), wanted one of"):
        HFDirectory(copy)[DOWN.format(0)]


def _dialect_of_4(raw: dict[str, Any]) -> None:
    text = raw["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    raw["transformers_version"] = "4.57.1"


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_both_dialects_of_the_configuration_read_alike(
    saved: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    old = _copy(saved[kind], tmp_path / "old", _dialect_of_4)
    config = Qwen3VLConfig.from_hf(old)
    assert config == Qwen3VLConfig.from_hf(saved[kind])
    assert config.rope_theta == 5e6
    assert config.mrope_section == (4, 2, 2)


def _drop(*path: str) -> Edit:
    def edit(raw: dict[str, Any]) -> None:
        for key in path[:-1]:
            raw = raw[key]
        del raw[path[-1]]

    return edit


def _put(value: object, *path: str) -> Edit:
    def edit(raw: dict[str, Any]) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            _drop("text_config", "rope_parameters", "rope_theta"),
            "no rope_theta or no mrope_section",
        ),
        (_drop("text_config", "rope_parameters", "mrope_section"), "no rope_theta or no mrope"),
        (_put("yarn", "text_config", "rope_parameters", "rope_type"), "rope_type 'yarn'"),
        (_put("qwen2_5_vl", "model_type"), "model_type is 'qwen2_5_vl', wanted qwen3_vl"),
        (_drop("vision_config"), "no vision_config"),
        (_drop("text_config", "head_dim"), "text_config lacks head_dim"),
        (_drop("text_config", "num_local_experts"), "text_config lacks num_experts"),
        (_put([1], "text_config", "mlp_only_layers"), "mixed dense and expert layers"),
        (_put(2, "text_config", "decoder_sparse_step"), "mixed dense and expert layers"),
        (_put("gelu", "text_config", "hidden_act"), "hidden_act is 'gelu', wanted 'silu'"),
        (_put("gelu", "vision_config", "hidden_act"), "wanted 'gelu_pytorch_tanh'"),
    ],
)
def test_configuration_that_cannot_be_trusted_is_refused(
    saved: dict[str, Path], tmp_path: Path, edit: Edit, message: str
) -> None:
    copy = _copy(saved["moe"], tmp_path / "copy", edit)
    with pytest.raises(ValueError, match=message) as error:
        Qwen3VLConfig.from_hf(copy)
    assert str(copy / "config.json") in str(error.value)


def test_a_truncated_configuration_is_named(saved: dict[str, Path], tmp_path: Path) -> None:
    copy = _copy(saved["dense"], tmp_path / "copy")
    file = copy / "config.json"
    file.write_text(file.read_text()[:90])
    with pytest.raises(ValueError, match=f"{file} is truncated or no JSON"):
        HFDirectory(copy)


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json not found"):
        Qwen3VLConfig.from_hf(tmp_path)


def _bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def test_written_shards_are_bounded_and_complete(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(saved["dense"] / SINGLE)
    most = max(t.numel() * 4 for t in weights.values())
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", most)
    out = tmp_path / "out"
    write(out, weights.items(), _bytes(weights), saved["dense"])
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        assert sum(t.numel() * 4 for t in load_file(shard).values()) <= most
    directory = HFDirectory(out)
    assert set(directory) == set(weights)
    assert all(torch.equal(directory[name], weights[name]) for name in weights)


def test_a_write_that_fails_leaves_the_old_directory(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    weights = load_file(saved["dense"] / SINGLE)
    out = tmp_path / "out"
    write(out, weights.items(), _bytes(weights), saved["dense"])

    def interrupted() -> Any:
        yield "lm_head.weight", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, interrupted(), 0, saved["dense"])
    assert torch.equal(HFDirectory(out)["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_live_model_that_is_spoilt_is_not_written(
    saved: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    weights = load_file(saved[kind] / SINGLE)
    out = tmp_path / "out"
    write(out, weights.items(), _bytes(weights), saved[kind])
    name = DOWN.format(2) if kind == "moe" else "lm_head.weight"
    weights[name][3, 5] = torch.inf
    with pytest.raises(ValueError, match=f"{out}: {name} has .* that are NaN or infinite"):
        write(out, weights.items(), _bytes(weights), saved[kind])
    assert HFDirectory(out)[name].isfinite().all()


def test_a_live_model_for_which_there_is_no_room_is_not_begun(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    taken = []

    def weights() -> Any:
        taken.append("lm_head.weight")
        yield "lm_head.weight", torch.zeros(3)

    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"{out} needs 1.05e.06 GiB more and its disk has"):
        write(out, weights(), 2**50, saved["dense"])
    assert not out.exists()
    # other ranks make their part of the weights
    assert taken
