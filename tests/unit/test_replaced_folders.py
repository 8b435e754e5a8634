"""What the stages that write a model do with what is there already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint_tools.files import check_replaceable
from prism_megatron.config import schema
from prism_megatron.pipelines import convert, upcycle


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("_json", ".json")).write_text(text)
    return path


def test_an_earlier_result_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    source = folder(tmp_path / "models" / "Qwen", config_json="{}")

    def is_result(old: Path) -> bool:
        return (old / "done").exists()

    def check(out: Path) -> None:
        check_replaceable(out, [source], is_result)

    check(tmp_path / "new")
    check(folder(tmp_path / "empty"))
    check(folder(tmp_path / "earlier", done="", rest=""))
    with pytest.raises(ValueError, match=r"other holds something else than an earlier result"):
        check(folder(tmp_path / "other", notes=""))
    for out in (source, source.parent, tmp_path / "models" / ".." / "models"):
        with pytest.raises(ValueError, match=r"would replace .*Qwen, which it is made from"):
            check(out)
    with pytest.raises(ValueError, match="is a file"):
        check(source / "config.json")


def test_stages_touch_nothing_of_the_users(tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", config_json="{}")
    policy = folder(tmp_path / "policy", config_json=json.dumps({"model_type": "qwen3_vl"}))
    with pytest.raises(ValueError, match="holds something else"):
        convert.run(schema.Convert(hf=source, out=policy))
    with pytest.raises(ValueError, match="holds something else"):
        upcycle.run(schema.Upcycle(hf=source, out=policy))
    assert json.loads((policy / "config.json").read_text()) == {"model_type": "qwen3_vl"}
