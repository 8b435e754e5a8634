from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from prism_megatron import cli
from prism_megatron.config import load as configuration
from prism_megatron.config import schema

ROOT = Path(__file__).resolve().parents[2]
SFT = str(ROOT / "configs/quickstart/sft.yaml")


def test_dry_run_prints_the_resolved_configuration_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from prism_megatron.cli import main; "
        f"status = main(['sft', '--config', {SFT!r}, 'train.steps=23', '--dry-run']); "
        "heavy = {'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(ran.stdout)
    assert configuration.load("sft", printed, []) == configuration.load(
        "sft", SFT, ["train.steps=23"]
    )


def test_overrides_may_stand_before_between_and_after_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["sft", "train.steps=5", "--config", SFT, "run.seed=6", "--dry-run", "batch_size=9"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "steps: 5\n" in printed and "seed: 6\n" in printed and "batch_size: 9\n" in printed


def test_a_mistake_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--config", SFT, "train.stpes=3", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "train.stpes: unknown key, did you mean train.steps?" in error
    assert "Traceback" not in error


def test_a_missing_configuration_file_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def test_the_traceback_is_there_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_TRACEBACK", "1")
    assert cli.main(["sft", "--config", SFT, "nope=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "nearest"), [("stf", "sft"), ("alingn", "align")])
def test_a_misspelt_stage_names_the_nearest(
    given: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([given]) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_a_misspelt_checkpoint_tool_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "hf-to-megatrn"]) == 2
    assert "did you mean hf-to-megatron?" in capsys.readouterr().err


def test_only_rank_0_speaks_of_a_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sft", "--config", SFT, "nope=3"]) == 2
    assert cli.main(["sft", "--config", SFT, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_another_rank_says_which_it_is_when_its_stage_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    config = str(ROOT / "configs/quickstart/report.yaml")
    assert cli.main(["report", "--config", config, f"dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("prism-megatron (rank 1): ")


def test_a_layout_that_does_not_fit_the_world_stops_before_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["sft", "--config", SFT]) == 2
    error = capsys.readouterr().err
    assert "model.parallel: tensor 2 x pipeline 1 = 2 does not divide world size 3" in error


def test_one_process_is_a_world_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["sft", "--config", SFT]) == 2
    assert "does not divide world size 1" in capsys.readouterr().err


def test_a_defect_in_a_library_keeps_its_traceback(tmp_path: Path) -> None:
    # a ValueError that json raises for itself is no message for the user
    def defect(config: schema.Section) -> None:
        json.loads("{")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_function", lambda entry_point: defect)
        with pytest.raises(json.JSONDecodeError):
            config = str(ROOT / "configs/quickstart/report.yaml")
            cli.main(["report", "--config", config, f"dir={tmp_path}"])


LAST = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
from prism_megatron import cli

class Kept:
    def __del__(self):
        sys.__stdout__.write("torn down ")

def main():
    print("main", end=" ")
    ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.2), print("thread", end=" ")))
    return 3

kept = Kept()
atexit.register(print, "registered", end=" ")
cli.main = main
cli.run()
"""


def test_a_command_ends_with_all_but_the_interpreter() -> None:
    ran = subprocess.run([sys.executable, "-c", LAST], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split()) == (3, ["main", "thread", "registered"])


def test_a_process_that_is_ended_from_beneath_python_says_where_it_was() -> None:
    code = "import os; from prism_megatron import cli; cli.main(['-h']); os.abort()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ran.stderr and 'File "<string>", line 1' in ran.stderr


@pytest.mark.parametrize("stage", list(configuration.STAGES))
def test_help_lists_every_key_with_type_and_default(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([stage, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for key, type_and_default, meaning in configuration.describe(configuration.STAGES[stage]):
        name = key.rpartition(".")[2]
        line = f"{name}:  {meaning}" if type_and_default == "section" else name
        assert line in printed and meaning in printed
        if type_and_default != "section":
            assert f"{name}  ({type_and_default})" in printed


def test_help_without_a_stage_lists_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for stage in configuration.STAGES:
        assert f"  {stage} " in printed


def test_stages_and_entry_points_are_the_same() -> None:
    assert list(cli.ENTRY_POINTS) == list(configuration.STAGES)


@pytest.mark.parametrize("stage", list(cli.ENTRY_POINTS))
def test_every_entry_point_takes_the_configuration_of_its_stage(stage: str) -> None:
    module, _, function = cli.ENTRY_POINTS[stage].partition(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    [annotation] = [parameter.annotation for parameter in parameters.values()]
    assert annotation.rpartition(".")[2] == configuration.STAGES[stage].__name__


@pytest.mark.parametrize("name", cli.CHECKPOINT_TOOLS)
def test_every_checkpoint_tool_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["checkpoint", name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_a_stage_that_owns_its_folder_leaves_configuration_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[schema.Section] = []
    monkeypatch.setattr(cli, "_function", lambda entry_point: seen.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sft", "--config", SFT, f"run.dir={tmp_path / 'sft'}"]) == 0
    assert seen == [configuration.load("sft", tmp_path / "sft" / "config.yaml", [])]


def test_the_evaluation_does_not_replace_the_record_of_the_stage_it_looks_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_function", lambda entry_point: lambda config: None)
    config = str(ROOT / "configs/quickstart/evaluate.yaml")
    assert cli.main(["evaluate", "--config", config, f"vars.dir={tmp_path}"]) == 0
    assert list(tmp_path.rglob("config.yaml")) == []


def test_the_module_and_the_script_are_the_same_command() -> None:
    script = Path(sys.executable).with_name("prism-megatron")
    outputs = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, env=os.environ).stdout
        for command in ([str(script)], [sys.executable, "-m", "prism_megatron"])
    ]
    assert outputs[0] == outputs[1] != ""


def test_megatrons_own_warnings_are_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            cli.main(["--help"])
            for module in ("megatron.core.optimizer", "prism_megatron.cli", "torch.nn"):
                warnings.warn_explicit("no GPU", UserWarning, "file.py", 1, module)
            warnings.warn_explicit("escape", SyntaxWarning, "/site/megatron/core/x.py", 1)
        return [f"{w.category.__name__} {w.message}" for w in found]

    monkeypatch.setattr("sys.warnoptions", [])
    assert told() == 2 * ["UserWarning no GPU"]
    monkeypatch.setattr("sys.warnoptions", ["default"])
    assert len(told()) == 4
